"""When a run saves, what it saves, and how a run takes it up again."""

import dataclasses
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor

from mixtral_ms.checkpoint.async_writer import CheckpointWriter
from mixtral_ms.checkpoint.dtypes import cast
from mixtral_ms.checkpoint.folders import checkpoint_name, list_checkpoints
from mixtral_ms.checkpoint.store import Checkpoint, load_checkpoint, resolve_checkpoint
from mixtral_ms.checkpoint.tensors import TensorSource
from mixtral_ms.config import RunConfig
from mixtral_ms.config.training_sections import CheckpointMonitorSection
from mixtral_ms.convert.lora import ADAPTER_STEM, require_base
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.loss_scale import LossScale
from mixtral_ms.train.optimizer import AdamW

MODEL, OPTIMIZER = "model", "optimizer"


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
    """

    def __init__(
        self,
        config: RunConfig,
        network: MixtralForCausalLM,
        optimizer: AdamW,
        loss_scale: LossScale,
        fingerprint: str,
        base: dict[str, str] | None = None,
    ) -> None:
        self.section = checkpoint_section(config)
        self.config, self.fingerprint, self.base = config, fingerprint, base
        self.network, self.optimizer, self.loss_scale = network, optimizer, loss_scale
        self.writer = CheckpointWriter(
            checkpoint_root(config), self.section.keep_checkpoint_max, self.section.async_save
        )
        self.saved_step: int | None = None
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether this step is to be saved."""
        every, seconds = self.section.save_checkpoint_steps, self.section.save_checkpoint_seconds
        by_step = every > 0 and step % every == 0
        return by_step or (seconds > 0 and time.monotonic() - self._saved_at >= seconds)

    def save(self, step: int) -> None:
        """Save the state after `step` steps, once."""
        if self.saved_step == step:
            return
        name = checkpoint_name(self.section.prefix, step)
        tensors = {
            stem_of(self.network): {p.name: p.asnumpy() for p in self.network.trainable_params()},
            OPTIMIZER: self.optimizer.state_tensors(),
        }
        self.writer.save(name, tensors, self._state(step))
        self.saved_step, self._saved_at = step, time.monotonic()
        get_logger().info("saved %s", self.writer.root / name)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
    return MODEL if network.config.pet_config is None else ADAPTER_STEM


def data_state(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What decides which rows a step sees: it must not change between a save and a resume."""
    return {
        "fingerprint": fingerprint,
        "seed": config.seed,
        "shuffle": config.train_dataset.data_loader.shuffle,
        "batch_size": config.runner_config.batch_size,
        "gradient_accumulation_steps": config.runner_config.gradient_accumulation_steps,
    }


def find_resume(config: RunConfig) -> Checkpoint | None:
    """The checkpoint that resume_training asks for; None to start from step 0.

    Raises:
        UserError: it is damaged or does not exist, though its place was named.
    """
    if not config.resume_training:
        return None
    name = config.resume_training if isinstance(config.resume_training, str) else None
    root = _resume_root(config)
    if not config.load_checkpoint and name is None and not list_checkpoints(root):
        get_logger().info("no checkpoint in %s yet: starting from step 0", root)
        return None
    path = resolve_checkpoint(root, name)
    get_logger().info("resuming from %s", path)
    return load_checkpoint(path, verify=False)  # resolve_checkpoint has verified it


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
    checkpoint: Checkpoint,
    config: RunConfig,
    network: MixtralForCausalLM,
    optimizer: AdamW,
    loss_scale: LossScale,
    fingerprint: str,
    base: dict[str, str] | None = None,
) -> int:
    """Put a checkpoint's state in place; returns the step it was saved after.

    Raises:
        UserError: it is of another network, its adapters are for other weights, or the data would
            not continue where it stopped.
    """
    state, stem = checkpoint.state, stem_of(network)
    if stem not in checkpoint.tensors:
        holds, wants = ("whole weights", "adapters") if base else ("adapters", "whole weights")
        raise UserError(
            f"cannot resume {checkpoint.path}: it holds {holds}, and this run trains {wants}, as "
            "model_config.pet_config says: make that what it was"
        )
    if OPTIMIZER not in checkpoint.tensors:
        raise UserError(
            f"cannot resume {checkpoint.path}: it holds weights without optimizer state; to start "
            f"a new run from them: --resume_training False --load_checkpoint {checkpoint.path}"
        )
    _require_same_data(state, data_state(config, fingerprint), checkpoint.path)
    if base:
        _require_same_adapters(checkpoint, network)
        require_base(state["base"], base["fingerprint"], checkpoint.path, base["path"])
    load_parameters(network.trainable_params(), checkpoint.tensors[stem].source)
    optimizer.load_state_tensors(checkpoint.tensors[OPTIMIZER])
    optimizer.updates = state["optimizer_updates"]
    saved = state["loss_scale"]
    loss_scale.value, loss_scale.good_steps = saved["value"], saved["good_steps"]
    loss_scale.skipped_in_a_row = saved["skipped_in_a_row"]
    return state["step"]


def load_parameters(
    parameters: list[Parameter], source: TensorSource, *, partial: bool = False
) -> None:
    """Copy tensors into a network's parameters; `partial` leaves those without one as they are.

    Raises:
        UserError: a tensor is missing, surplus or of another shape; up to ten are named.
    """
    infos = source.infos
    named = {p.name: p for p in parameters}
    missing = () if partial else named.keys() - infos.keys()
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} is not in the network" for name in infos.keys() - named.keys()]
    for name in named.keys() & infos.keys():
        shape = infos[name].shape
        if shape != named[name].shape:
            problems.append(f"{name} has shape {shape}, the network {named[name].shape}")
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise UserError(
            f"{source.path} does not fit model.model_config, {len(problems)} tensors differ:"
            f"\n  {shown}"
        )
    for name in named.keys() & infos.keys():
        values = cast(source.read(name), infos[name].dtype, "float32")
        # a copy: MindSpore keeps the array that it is given, and this one may be a file's
        named[name].set_data(Tensor.from_numpy(np.array(values)))


def _require_same_adapters(checkpoint: Checkpoint, network: MixtralForCausalLM) -> None:
    saved = checkpoint.state["model_config"]["pet_config"]
    current = dataclasses.asdict(network.config.pet_config)
    changed = [
        f"{key} was {saved.get(key)!r} and is {value!r}"
        for key, value in current.items()
        if saved.get(key) != value
    ]
    if changed:
        raise UserError(
            f"cannot resume {checkpoint.path}: of model_config.pet_config {'; '.join(changed)}"
        )


def _require_same_data(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    changed = [
        f"{key} was {saved['data'].get(key)!r} and is {value!r}"
        for key, value in current.items()
        if saved["data"].get(key) != value
    ]
    if changed:
        raise UserError(
            f"cannot resume {path}: the rows after step {saved['step']} would be others: "
            f"{'; '.join(changed)}. Restore these, or start a new run from the weights: "
            f"--resume_training False --load_checkpoint {path} with a new --output_dir"
        )
