"""When a run saves, and what it saves."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_ms.checkpoint.formats.strategy_file import write_strategies
from mixtral_ms.checkpoint.shards.rank_files import ADAPTER_STEM, MODEL_STEM, OPTIMIZER_STEM
from mixtral_ms.checkpoint.store.async_writer import CheckpointWriter
from mixtral_ms.checkpoint.store.folders import checkpoint_name
from mixtral_ms.checkpoint.store.multi_rank_save import STRATEGY_FOLDER, WAIT_SECONDS, SavingRanks
from mixtral_ms.config import RunConfig
from mixtral_ms.config.loading.resolve import is_zero
from mixtral_ms.config.sections.training_section import CheckpointMonitorSection
from mixtral_ms.log import get_logger
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.comm.hosts import Board
from mixtral_ms.parallel.grid.sharding_rules import (
    adapter_shapes,
    parameter_shapes,
    placements,
)
from mixtral_ms.train.state.rank_agreement import Storage
from mixtral_ms.train.state.run_facts import TrainingFacts
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.loss_scale import LossScale


def checkpoint_section(config: RunConfig) -> CheckpointMonitorSection:
    """The run's CheckpointMonitor; without one, its defaults, so that the end is always saved."""
    for callback in config.callbacks:
        if isinstance(callback, CheckpointMonitorSection):
            return callback
    return CheckpointMonitorSection()


def checkpoint_root(config: RunConfig) -> Path:
    """Folder of the run's checkpoints."""
    section = checkpoint_section(config)
    return Path(section.directory or Path(config.output_dir) / "checkpoint")


class Saver:
    """Saves a run's state as CheckpointMonitor says.

    Args:
        config: the run.
        network: whose parameters to save.
        optimizer: whose moments to save.
        loss_scale: saved with the state.
        data: what the steps see of it, so that a resume on other data is refused.
        training: how the next step trains, so that a resume says what it does otherwise.
        others: further entries of the state: the weights beneath adapters, the chat template.
        storage: what the ranks of this run have agreed on.
    """

    def __init__(
        self,
        config: RunConfig,
        network: MixtralForCausalLM,
        optimizer: AdamW,
        loss_scale: LossScale,
        data: dict[str, Any],
        training: TrainingFacts,
        others: Mapping[str, Any],
        storage: Storage | None = None,
    ) -> None:
        self.section = checkpoint_section(config)
        self.data, self.training, self.others = data, training, others
        self.network, self.optimizer, self.loss_scale = network, optimizer, loss_scale
        self.writer = CheckpointWriter(
            checkpoint_root(config),
            self.section.keep_checkpoint_max,
            self.section.async_save,
            saving_ranks(network, storage or Storage(), zero=is_zero(config)),
        )
        self.saved_step: int | None = None
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether this step is to be saved whatever the time."""
        every = self.section.save_checkpoint_steps
        return every > 0 and step % every == 0

    def time_is_up(self) -> bool:
        """Whether enough time has passed since the last save."""
        seconds = self.section.save_checkpoint_seconds
        return seconds > 0 and time.monotonic() - self._saved_at >= seconds

    def save(self, step: int) -> None:
        """Save the state after `step` steps, once."""
        if self.saved_step == step:
            return
        name = checkpoint_name(self.section.prefix, step)
        tensors = {
            stem_of(self.network): {p.name: p.asnumpy() for p in self.network.trainable_params()},
            OPTIMIZER_STEM: self.optimizer.state_tensors(),
        }
        self.writer.save(name, tensors, self._state(step))
        self.saved_step, self._saved_at = step, time.monotonic()
        get_logger().info("saved %s", self.writer.root / name)

    def close(self) -> None:
        """Return when everything is on disk."""
        self.writer.close()

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "optimizer_updates": self.optimizer.updates,
            "loss_scale": dataclasses.asdict(self.loss_scale),
            "data": self.data,
            "training": self.training.behind(step),
            "model_config": dataclasses.asdict(self.network.config),
            **self.others,
        }


def stem_of(network: MixtralForCausalLM) -> str:
    """Name of the file of what is trained: whole weights, or adapters alone."""
    return MODEL_STEM if network.config.pet_config is None else ADAPTER_STEM


def saving_ranks(
    network: MixtralForCausalLM, storage: Storage, *, zero: bool
) -> SavingRanks | None:
    """This process among those that save; None where it is alone. All of a run must ask."""
    mesh, hosts = network.mesh, storage.hosts
    if mesh.world_size == 1:
        return None
    board = Board(hosts, WAIT_SECONDS) if hosts else None
    return SavingRanks(network.config, mesh, zero, storage.run, board)


def write_strategy_files(config: RunConfig, network: MixtralForCausalLM) -> None:
    """MindSpore's strategy files of a run on several ranks, in output_dir/strategy."""
    folder = Path(config.output_dir) / STRATEGY_FOLDER
    if network.mesh.world_size == 1:
        return
    for file in folder.glob("ckpt_strategy_rank_*.ckpt"):  # of the layout before a resume
        file.unlink()
    names = parameter_shapes(network.config) | adapter_shapes(network.config)
    zero = is_zero(config)
    write_strategies(folder, placements(network.config, network.mesh.grid, names, zero=zero))
