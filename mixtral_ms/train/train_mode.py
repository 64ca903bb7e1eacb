"""`Trainer.train`: what may stand in a run's way, then the run."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mixtral_ms.checkpoint.store.folders import list_checkpoints
from mixtral_ms.config import RunConfig
from mixtral_ms.errors import UserError
from mixtral_ms.files import sole_writer
from mixtral_ms.parallel.comm.process_groups import gather_objects
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.builders import metrics_path
from mixtral_ms.train.objectives.objective import MakeObjective
from mixtral_ms.train.state.rank_agreement import Storage, agree_on_storage
from mixtral_ms.train.state.resume import find_resume
from mixtral_ms.train.state.saver import checkpoint_root
from mixtral_ms.train.training_run import TrainingRun, TrainResult


def train(config: RunConfig, mesh: Mesh, objective: MakeObjective) -> TrainResult:
    """Train until the last step, or until a signal; ends with a save. See `Trainer.train`."""
    root = checkpoint_root(config)
    storage = agree_on_storage(mesh, root, shared=not config.no_shared_storage)
    with _sole_run(config, mesh, storage):
        checkpoint = find_resume(config, mesh, storage)
        if not config.resume_training:
            _require_fresh(config)
        _require_weights(config, checkpoint is not None)
        return TrainingRun(config, mesh, storage, checkpoint, objective).run()


@contextlib.contextmanager
def _sole_run(config: RunConfig, mesh: Mesh, storage: Storage) -> Iterator[None]:
    """Own what the run writes until the block ends. All ranks must ask, and all are refused."""
    with contextlib.ExitStack() as held:
        problem = None
        try:
            for lock, refusal in _locks(config) if mesh.rank == 0 or storage.leads else ():
                held.enter_context(sole_writer(lock, refusal))
        except UserError as error:
            problem = str(error)
        problems = gather_objects(mesh.world, problem)
        if found := next((one for one in problems if one), None):
            raise UserError(found)
        yield


def _locks(config: RunConfig) -> Iterator[tuple[Path, str]]:
    """A lock for output_dir, and for what goes elsewhere, each with what its error says."""
    output, root, metrics = Path(config.output_dir), checkpoint_root(config), metrics_path(config)
    yield (
        output / ".run.lock",
        f"output_dir {output}: another run is under way: choose another --output_dir, or wait",
    )
    within = output.resolve()
    if not root.resolve().is_relative_to(within):
        yield (
            root / ".run.lock",
            f"CheckpointMonitor's directory {root}: another run saves its checkpoints there: "
            "choose another, or wait",
        )
    if not metrics.resolve().is_relative_to(within):
        yield (
            metrics.with_name(f".{metrics.name}.lock"),
            f"MetricsWriter's path {metrics}: another run writes it: choose another, or wait",
        )


def _require_weights(config: RunConfig, resumed: bool) -> None:
    """Fine-tuning starts from weights, and adapters are never without them."""
    adapters = config.model.model_config.pet_config is not None
    starts_from_them = config.mode.trains and config.mode.needs_weights and not resumed
    if not config.load_checkpoint and (adapters or starts_from_them):
        why = "LoRA trains adapters" if adapters else f"run_mode {config.run_mode} starts"
        how = "for" if adapters else "from"
        raise UserError(
            f"{why} {how} weights, but load_checkpoint is empty: set --load_checkpoint to them"
        )


def _require_fresh(config: RunConfig) -> None:
    """A new run must not mix with what an earlier one left."""
    metrics, root = metrics_path(config), checkpoint_root(config)
    held = metrics if metrics.exists() else root if list_checkpoints(root) else None
    if held is not None:
        raise UserError(
            f"output_dir {config.output_dir} already holds a run ({held}): go on with it by "
            "--resume_training True, or choose another --output_dir"
        )
