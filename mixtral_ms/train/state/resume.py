"""How a run takes up what an earlier one has saved, on any layout."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_ms.checkpoint.formats.tensor_source import TensorSource
from mixtral_ms.checkpoint.reshard.open_checkpoint import OpenedSource, open_source
from mixtral_ms.checkpoint.shards.assemble import is_optimizer_state
from mixtral_ms.checkpoint.store.folders import list_checkpoints
from mixtral_ms.checkpoint.store.manifest import (
    BASE_SHAPE,
    LOSS_SCALE_SHAPE,
    STATE,
    verify_checkpoint,
)
from mixtral_ms.checkpoint.store.store import find_checkpoint
from mixtral_ms.config import RunConfig
from mixtral_ms.config.checks.saved_network import saved_network
from mixtral_ms.config.derived.numerics import numeric_differences
from mixtral_ms.config.derived.parameter_row import is_lora_name
from mixtral_ms.config.loading.resolve import is_zero
from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.convert.adapters.lora_weights import require_base
from mixtral_ms.convert.formats.found_weights import FoundWeights, Kind, find_weights
from mixtral_ms.errors import UserError
from mixtral_ms.json_reader import JsonShape, require_shape
from mixtral_ms.log import get_logger
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.comm.hosts import Hosts
from mixtral_ms.parallel.comm.process_groups import gather_objects
from mixtral_ms.parallel.grid.grid_text import format_grid
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.parallel.grid.sharding_rules import MOMENTS
from mixtral_ms.train.state.host_storage import open_on_all_hosts, require_undamaged_everywhere
from mixtral_ms.train.state.parameter_loading import OwnTensors, load_parameters
from mixtral_ms.train.state.rank_agreement import Storage
from mixtral_ms.train.state.saver import checkpoint_root
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.loss_scale import LossScale

_SPLIT_KEYS = ("batch_size", "data_parallel", "micro_batches")
"""How rows_per_step is divided: may change between a save and a resume."""

_STATE: dict[str | type[str], JsonShape] = {
    "step": int,
    "optimizer_updates": int,
    "loss_scale": LOSS_SCALE_SHAPE,
    "data": {
        "fingerprint": str,
        "seed": int,
        "shuffle": bool,
        "rows_per_step?": int,
        "batch_size": int,
        "gradient_accumulation_steps?": int,
    },
    "training?": {"keys": dict, "next_learning_rate": float},
}
"""What is read of a state; older ones lack what has a question mark."""
_RESTORE = (
    "Restore these, or start a new run from the weights: --resume_training False "
    "--load_checkpoint {path} with a new --output_dir"
)


def find_resume(config: RunConfig, mesh: Mesh, storage: Storage) -> OpenedSource | None:
    """The checkpoint that resume_training asks for; None to start from step 0.

    The first rank chooses; each reads a share of the files to compare them with their hashes.

    Raises:
        UserError: it is damaged or does not exist, though its path was given.
    """
    if not config.resume_training:
        return None
    if storage.hosts:
        return _resume_on_hosts(config, mesh, storage.hosts)
    found = _resume_path(config) if mesh.rank == 0 else None
    path = gather_objects(mesh.world, found and str(found))[0]
    if path is None:
        return None
    own = verify_checkpoint(path, mesh.rank, mesh.world_size)
    require_undamaged_everywhere(mesh.world, Path(path), own)
    return open_source(Path(path), verify=False)


def _resume_on_hosts(config: RunConfig, mesh: Mesh, hosts: Hosts) -> OpenedSource | None:
    name, root = _resume_name(config), _resume_root(config)
    if all(gather_objects(mesh.world, _nothing_yet(config, root))):
        get_logger().info("no checkpoint in %s on any host: starting from step 0", root)
        return None
    strategy = format_grid(mesh.grid, zero=is_zero(config))
    return open_on_all_hosts(root, name, hosts, strategy)


def _resume_name(config: RunConfig) -> str | None:
    return config.resume_training if isinstance(config.resume_training, str) else None


def _nothing_yet(config: RunConfig, root: Path) -> bool:
    """Whether the run may start from step 0: nothing is there, and nothing was named."""
    named = config.load_checkpoint or _resume_name(config)
    return not named and not list_checkpoints(root)


def _resume_path(config: RunConfig) -> Path | None:
    name, root = _resume_name(config), _resume_root(config)
    if _nothing_yet(config, root):
        get_logger().info("no checkpoint in %s yet: starting from step 0", root)
        return None
    path = find_checkpoint(root, name) if name else _resumable(find_weights(root))
    get_logger().info("resuming from %s", path)
    return path


def _resumable(found: FoundWeights) -> Path:
    """The checkpoint's folder: only our own hold what a run goes on from."""
    if found.kind in (Kind.CHECKPOINT, Kind.LORA):
        return found.path
    weights = found.kind not in (Kind.NOTHING, Kind.PEFT)
    raise UserError(
        f"cannot resume {found.path}: it is {found.kind.value}, and no checkpoint with optimizer "
        "state"
        + weights
        * f"; to start a new run from it: --resume_training False --load_checkpoint {found.path}"
    )


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
    data: dict[str, Any],
    base: dict[str, str] | None = None,
) -> int:
    """Put a checkpoint's state in place; returns the step it was saved after.

    It may have been saved on any layout: this rank reads what it holds of each tensor.

    Raises:
        UserError: it is of another network, be it one with equal shapes, its adapters are for
            other weights, or the data would not continue where it stopped.
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
    _require_sound(state, path, of_adapters=base is not None)
    _require_same_data(state, data, path)
    if base:
        _require_same_adapters(checkpoint, network.config.pet_config)
        require_base(state["base"], base["fingerprint"], path, base["path"])
    load_parameters(network, checkpoint.tensors, adapters=base is not None)
    _require_same_network(state, network.config, path)
    moments = [prefix + p.name for prefix in MOMENTS for p in network.trainable_params()]
    optimizer.load_state_tensors(OwnTensors(checkpoint.tensors, network, moments, is_zero(config)))
    optimizer.updates = state["optimizer_updates"]
    saved = state["loss_scale"]
    loss_scale.value, loss_scale.good_steps = saved["value"], saved["good_steps"]
    loss_scale.skipped_in_a_row = saved["skipped_in_a_row"]
    return state["step"]


def _require_sound(state: Mapping[str, Any], path: Path, *, of_adapters: bool) -> None:
    """A manifest tells damage; this is of states that something else has written."""
    where = str(path / STATE)
    require_shape(dict(state), _STATE | ({"base": BASE_SHAPE} if of_adapters else {}), where)
    scale = state["loss_scale"]
    for key, value in (
        ("step", state["step"]),
        ("optimizer_updates", state["optimizer_updates"]),
        ("loss_scale.good_steps", scale["good_steps"]),
        ("loss_scale.skipped_in_a_row", scale["skipped_in_a_row"]),
    ):
        if value < 0:
            raise UserError(f"{where}: {key} is {value}; it must be 0 or more")
    if not scale["value"] > 0:
        raise UserError(f"{where}: loss_scale.value is {scale['value']}; it must be above 0")


def _holds_adapters(source: TensorSource) -> bool:
    return any(is_lora_name(name) for name in source.infos)


def _require_same_adapters(checkpoint: OpenedSource, pet: PetSection | None) -> None:
    before = saved_network(checkpoint.state, checkpoint.folder / STATE)
    saved, current = (
        {} if one is None else dataclasses.asdict(one)
        for one in (before and before.pet_config, pet)
    )
    changed = [
        f"{key} was {saved.get(key)!r} and is {value!r}"
        for key, value in current.items()
        if saved.get(key) != value
    ]
    if changed:
        raise UserError(
            f"cannot resume {checkpoint.folder}: of model_config.pet_config {'; '.join(changed)}"
        )


def _require_same_network(saved: Mapping[str, Any], network: MixtralConfig, path: Path) -> None:
    """What does not show in shapes; `load_parameters` has compared those."""
    before = saved_network(saved, path / STATE)
    changed = before and numeric_differences(before, network)
    if changed:
        raise UserError(
            f"cannot resume {path}: it is of another network: {'; '.join(map(str, changed))}. "
            f"{_RESTORE.format(path=path)}"
        )


def _require_same_data(saved: Mapping[str, Any], current: dict[str, Any], path: Path) -> None:
    """The sequences of each step must stay; who takes which of them may change."""
    before = dict(saved["data"])
    if "rows_per_step" not in before:  # saved when one process was all there was
        before["rows_per_step"] = before["batch_size"] * before.get(
            "gradient_accumulation_steps", 1
        )
    changed = [
        f"{key} was {before[key]!r} and is {value!r}"
        for key, value in current.items()
        if key in before and before[key] != value
    ]
    if all(text.startswith(_SPLIT_KEYS) for text in changed):
        if changed:
            get_logger().info("the same sequences a step, shared otherwise: %s", "; ".join(changed))
        return
    raise UserError(
        f"cannot resume {path}: the sequences after step {saved['step']} would be others: "
        f"{'; '.join(changed)}. {_RESTORE.format(path=path)}"
    )
