"""`Trainer.train`: what may stand in a run's way, then the run."""

from mixtral_ms.checkpoint.store.folders import list_checkpoints
from mixtral_ms.config import RunConfig
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.builders import metrics_path
from mixtral_ms.train.objectives.objective import MakeObjective
from mixtral_ms.train.state.rank_agreement import agree_on_storage
from mixtral_ms.train.state.resume import find_resume
from mixtral_ms.train.state.saver import checkpoint_root
from mixtral_ms.train.training_run import TrainingRun, TrainResult


def train(config: RunConfig, mesh: Mesh, objective: MakeObjective) -> TrainResult:
    """Train until the last step, or until a signal; ends with a save. See `Trainer.train`."""
    root = checkpoint_root(config)
    storage = agree_on_storage(mesh, root, shared=not config.no_shared_storage)
    checkpoint = find_resume(config, mesh, storage)
    if not config.resume_training:
        _require_fresh(config)
    _require_weights(config, checkpoint is not None)
    return TrainingRun(config, mesh, storage, checkpoint, objective).run()


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
