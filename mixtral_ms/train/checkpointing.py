"""When a run saves, what it saves, and how a run takes it up again."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from mixtral_ms.checkpoint.assemble import is_optimizer_state
from mixtral_ms.checkpoint.async_writer import CheckpointWriter
from mixtral_ms.checkpoint.dtypes import cast
from mixtral_ms.checkpoint.folders import checkpoint_name, list_checkpoints
from mixtral_ms.checkpoint.manifest import verify_checkpoint
from mixtral_ms.checkpoint.rank_files import ADAPTER_STEM, MODEL_STEM, OPTIMIZER_STEM
from mixtral_ms.checkpoint.rank_parts import STRATEGY_FOLDER, SavingRanks
from mixtral_ms.checkpoint.sharded import OpenedSource, open_source
from mixtral_ms.checkpoint.store import find_checkpoint, require_undamaged
from mixtral_ms.checkpoint.tensors import Region, TensorSource
from mixtral_ms.config import RunConfig
from mixtral_ms.config.resolve import rows_per_step
from mixtral_ms.config.training_sections import CheckpointMonitorSection
from mixtral_ms.convert.lora import require_base
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.connection import gather_objects
from mixtral_ms.parallel.layout import (
    LORA_A,
    LORA_B,
    MOMENTS,
    adapter_shapes,
    parameter_of,
    parameter_shapes,
    placements,
)
from mixtral_ms.parallel.mesh import Mesh
from mixtral_ms.parallel.strategy_file import write_strategies
from mixtral_ms.train.loss_scale import LossScale
from mixtral_ms.train.optimizer import AdamW

_SPLIT_KEYS = ("batch_size", "data_parallel", "micro_batches")
"""How rows_per_step is divided: may change between a save and a resume."""


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
        fingerprint: of the data, so that a resume on other data is refused.
        base: the record of the weights beneath adapters; None where the weights are trained.
        run: a text that the ranks of this run share.
    """

    def __init__(
        self,
        config: RunConfig,
        network: MixtralForCausalLM,
        optimizer: AdamW,
        loss_scale: LossScale,
        fingerprint: str,
        base: dict[str, str] | None = None,
        run: str = "",
    ) -> None:
        self.section = checkpoint_section(config)
        self.config, self.fingerprint, self.base = config, fingerprint, base
        self.network, self.optimizer, self.loss_scale = network, optimizer, loss_scale
        several = network.mesh.world_size > 1
        self.writer = CheckpointWriter(
            checkpoint_root(config),
            self.section.keep_checkpoint_max,
            self.section.async_save,
            SavingRanks(network.config, network.mesh, is_zero(config), run) if several else None,
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
            "data": data_state(self.config, self.fingerprint),
            "model_config": dataclasses.asdict(self.network.config),
            **({"base": self.base} if self.base else {}),
        }


def stem_of(network: MixtralForCausalLM) -> str:
    """Name of the file of what is trained: whole weights, or adapters alone."""
    return MODEL_STEM if network.config.pet_config is None else ADAPTER_STEM


def is_zero(config: RunConfig) -> bool:
    """Whether the optimizer's moments are cut over replicas."""
    return config.use_parallel and config.parallel.enable_parallel_optimizer


def data_state(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What decides which rows a step sees, and how ranks and micro batches share them."""
    rows, size = rows_per_step(config), config.runner_config.batch_size
    data = config.parallel_config.data_parallel if config.use_parallel else 1
    return {
        "fingerprint": fingerprint,
        "seed": config.seed,
        "shuffle": config.train_dataset.data_loader.shuffle,
        "rows_per_step": rows,
        "batch_size": size,
        "data_parallel": data,
        "micro_batches": rows // (size * data),
    }


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


def find_resume(config: RunConfig, mesh: Mesh) -> OpenedSource | None:
    """The checkpoint that resume_training asks for; None to start from step 0.

    The first rank chooses; each reads a share of the files to compare them with their hashes.

    Raises:
        UserError: it is damaged or does not exist, though its place was named.
    """
    if not config.resume_training:
        return None
    found = _resume_path(config) if mesh.rank == 0 else None
    path = gather_objects(mesh.world, found and str(found))[0]
    if path is None:
        return None
    own = verify_checkpoint(path, mesh.rank, mesh.world_size)
    problems = [one for several in gather_objects(mesh.world, own) for one in several]
    require_undamaged(Path(path), problems)
    return open_source(Path(path), verify=False)


def _resume_path(config: RunConfig) -> Path | None:
    name = config.resume_training if isinstance(config.resume_training, str) else None
    root = _resume_root(config)
    if not config.load_checkpoint and name is None and not list_checkpoints(root):
        get_logger().info("no checkpoint in %s yet: starting from step 0", root)
        return None
    path = find_checkpoint(root, name)
    get_logger().info("resuming from %s", path)
    return path


def _resume_root(config: RunConfig) -> Path:
    """Where to resume from: the run's own checkpoints, else load_checkpoint.

    A run that began with the weights of load_checkpoint goes on from what it has saved itself.
    """
    own = checkpoint_root(config)
    if not config.load_checkpoint:
        return own
    given = Path(config.load_checkpoint)
    if own.resolve() in (given.resolve(), given.resolve().parent) or not list_checkpoints(own):
        return given
    get_logger().info("%s holds checkpoints of this run: not resuming from %s", own, given)
    return own


def restore(
    checkpoint: OpenedSource,
    config: RunConfig,
    network: MixtralForCausalLM,
    optimizer: AdamW,
    loss_scale: LossScale,
    fingerprint: str,
    base: dict[str, str] | None = None,
) -> int:
    """Put a checkpoint's state in place; returns the step it was saved after.

    It may have been saved on any layout: this rank reads what it holds of each tensor.

    Raises:
        UserError: it is of another network, its adapters are for other weights, or the data would
            not continue where it stopped.
    """
    state, path = checkpoint.state, checkpoint.folder
    if _holds_adapters(checkpoint.tensors) != (base is not None):
        holds, wants = ("whole weights", "adapters") if base else ("adapters", "whole weights")
        raise UserError(
            f"cannot resume {path}: it holds {holds}, and this run trains {wants}, as "
            "model_config.pet_config says: make that what it was"
        )
    if not any(is_optimizer_state(name) for name in checkpoint.tensors.infos) or not state:
        raise UserError(
            f"cannot resume {path}: it holds weights without optimizer state; to start "
            f"a new run from them: --resume_training False --load_checkpoint {path}"
        )
    _require_same_data(state, data_state(config, fingerprint), path)
    if base:
        _require_same_adapters(checkpoint, network)
        require_base(state["base"], base["fingerprint"], path, base["path"])
    load_parameters(network, checkpoint.tensors, adapters=base is not None)
    moments = [prefix + p.name for prefix in MOMENTS for p in network.trainable_params()]
    optimizer.load_state_tensors(_OwnTensors(checkpoint.tensors, network, moments, is_zero(config)))
    optimizer.updates = state["optimizer_updates"]
    saved = state["loss_scale"]
    loss_scale.value, loss_scale.good_steps = saved["value"], saved["good_steps"]
    loss_scale.skipped_in_a_row = saved["skipped_in_a_row"]
    return state["step"]


def load_parameters(
    network: MixtralForCausalLM,
    source: TensorSource,
    *,
    adapters: bool = False,
    partial: bool = False,
) -> None:
    """Copy what this rank holds of a source's global tensors into the network.

    Args:
        network: its weights, or its adapters alone.
        source: global tensors under our names; optimizer state in it is not looked at.
        adapters: which of the two.
        partial: leave parameters without a tensor as they are.

    Raises:
        UserError: a tensor is missing, surplus or of another shape; up to ten are named.
    """
    config = network.config
    shapes = adapter_shapes(config) if adapters else parameter_shapes(config)
    _require_shapes(source, shapes, partial=partial)
    names = [p.name for p in network.get_parameters() if p.name in shapes]
    own = _OwnTensors(source, network, names, zero=False)
    for parameter in network.get_parameters():
        if parameter.name in own:
            # a copy: MindSpore keeps the array that it is given, and this one may be a file's
            parameter.set_data(Tensor.from_numpy(np.array(own[parameter.name])))


def _require_shapes(source: TensorSource, shapes: Mapping[str, tuple], *, partial: bool) -> None:
    found = {n: info.shape for n, info in source.infos.items() if not is_optimizer_state(n)}
    missing = () if partial else shapes.keys() - found.keys()
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} is not in the network" for name in found.keys() - shapes.keys()]
    problems += [
        f"{name} has shape {found[name]}, the network {shapes[name]}"
        for name in shapes.keys() & found.keys()
        if found[name] != shapes[name]
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise UserError(
            f"{source.path} does not fit model.model_config, {len(problems)} tensors differ:"
            f"\n  {shown}"
        )


class _OwnTensors(Mapping[str, np.ndarray]):
    """What this rank holds of some global tensors, in float32, read when it is asked for.

    Args:
        source: global tensors; names that it lacks are left out.
        network: says layout and rank.
        names: of parameters on this rank, or of their moments.
        zero: whether moments are cut over replicas.
    """

    def __init__(
        self, source: TensorSource, network: MixtralForCausalLM, names: Iterable[str], zero: bool
    ) -> None:
        self._source = source
        self._regions = own_regions(network, [n for n in names if n in source.infos], zero=zero)

    def __getitem__(self, name: str) -> np.ndarray:
        values = self._source.read(name, self._regions[name])
        return cast(values, self._source.infos[name].dtype, "float32")

    def __iter__(self) -> Iterator[str]:
        return iter(self._regions)

    def __len__(self) -> int:
        return len(self._regions)


def own_regions(
    network: MixtralForCausalLM, names: Iterable[str], *, zero: bool = False
) -> dict[str, Region]:
    """What this rank holds of parameters (or their moments) that are on its stage."""
    config, mesh = network.config, network.mesh
    shapes = parameter_shapes(config) | adapter_shapes(config)
    placed = placements(config, mesh.grid, names, zero=zero)
    return {
        name: places[mesh.stage].region(shapes[parameter_of(name)], mesh.rank)
        for name, places in placed.items()
    }


def _holds_adapters(source: TensorSource) -> bool:
    return any(name.endswith((LORA_A, LORA_B)) for name in source.infos)


def _require_same_adapters(checkpoint: OpenedSource, network: MixtralForCausalLM) -> None:
    saved = checkpoint.state["model_config"]["pet_config"]
    current = dataclasses.asdict(network.config.pet_config)
    changed = [
        f"{key} was {saved.get(key)!r} and is {value!r}"
        for key, value in current.items()
        if saved.get(key) != value
    ]
    if changed:
        raise UserError(
            f"cannot resume {checkpoint.folder}: of model_config.pet_config {'; '.join(changed)}"
        )


def _require_same_data(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """The rows of each step must stay; who takes which of them may change."""
    before = dict(saved["data"])
    if "rows_per_step" not in before:  # saved when one process was all there was
        before["rows_per_step"] = before["batch_size"] * before["gradient_accumulation_steps"]
    changed = [
        f"{key} was {before.get(key)!r} and is {value!r}"
        for key, value in current.items()
        if before.get(key) != value
    ]
    if all(text.startswith(_SPLIT_KEYS) for text in changed):
        if changed:
            get_logger().info("the same rows a step, shared otherwise: %s", "; ".join(changed))
        return
    raise UserError(
        f"cannot resume {path}: the rows after step {saved['step']} would be others: "
        f"{'; '.join(changed)}. Restore these, or start a new run from the weights: "
        f"--resume_training False --load_checkpoint {path} with a new --output_dir"
    )
