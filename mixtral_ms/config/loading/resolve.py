"""What follows from the keys that were given, filled in the way MindFormers does."""

from mixtral_ms.config.loading.home_paths import expand_homes
from mixtral_ms.config.sections.data_section import DatasetSection
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.config.sections.training_section import TensorBoardSection
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger


def resolve(config: RunConfig, *, moe_given_at_top: bool = True) -> RunConfig:
    """Fill in what other keys determine; changes and returns `config`."""
    if moe_given_at_top:
        config.model.model_config.moe_config = config.moe_config
    else:
        config.moe_config = config.model.model_config.moe_config
    named = config.model.model_config.checkpoint_name_or_path
    if named and config.load_checkpoint and named != config.load_checkpoint:
        get_logger().info(
            "model.model_config.checkpoint_name_or_path %s gives way to load_checkpoint %s",
            named,
            config.load_checkpoint,
        )
    config.load_checkpoint = config.load_checkpoint or named or ""
    config.src_strategy_path_or_dir = config.src_strategy_path_or_dir or ""
    expand_homes(config)
    _resolve_datasets(config)
    _note_remainder(config)
    _resolve_batch(config)
    _resolve_warmup(config)
    for callback in config.callbacks:
        if callback.type == "CheckpointMointor":  # an old misspelling in MindFormers' YAMLs
            callback.type = "CheckpointMonitor"
    if config.tensorboard is not None:
        config.callbacks.append(TensorBoardSection(log_dir=config.tensorboard.tensorboard_dir))
        config.tensorboard = None
    return config


def effective_parallel(config: RunConfig) -> ParallelConfig:
    """The rank grid of this run: `parallel_config`, or a single rank without `use_parallel`."""
    return config.parallel_config if config.use_parallel else ParallelConfig()


def is_zero(config: RunConfig) -> bool:
    """Whether the optimizer's moments are cut over replicas."""
    return config.use_parallel and config.parallel.enable_parallel_optimizer


def rank_count(config: RunConfig) -> int:
    """How many processes the run needs."""
    grid = effective_parallel(config)
    return grid.data_parallel * grid.model_parallel * grid.pipeline_stage * grid.context_parallel


def pipeline_micro_batches(grid: ParallelConfig) -> int:
    """Micro batches of a rank in one accumulation step."""
    return grid.micro_batch_num if grid.pipeline_stage > 1 else 1


def micro_batches(config: RunConfig) -> int:
    """Micro batches that a rank sees in one optimizer step, those in the pipeline included."""
    in_pipeline = pipeline_micro_batches(effective_parallel(config))
    return in_pipeline * config.runner_config.gradient_accumulation_steps


def dataset_of(config: RunConfig, *, training: bool) -> DatasetSection:
    """`train_dataset`, or `eval_dataset`. Raises UserError where the run has none."""
    section = config.train_dataset if training else config.eval_dataset
    if section is None:
        name = "train_dataset" if training else "eval_dataset"
        raise UserError(f"{name} is empty, but the run reads it: give it a data_loader")
    return section


def micro_batch_size(config: RunConfig) -> int:
    """Sequences of a micro batch of one rank."""
    size = config.runner_config.batch_size
    return 1 if size is None else size


def sequences_per_micro_step(config: RunConfig) -> int:
    """Sequences of all ranks whose gradients one accumulation step takes.

    In a pipeline that is all its micro batches.
    """
    grid = effective_parallel(config)
    return micro_batch_size(config) * grid.data_parallel * pipeline_micro_batches(grid)


def sequences_per_step(config: RunConfig) -> int:
    """Sequences of all ranks that one optimizer step takes."""
    return sequences_per_micro_step(config) * config.runner_config.gradient_accumulation_steps


def _resolve_datasets(config: RunConfig) -> None:
    for name in ("train_dataset", "eval_dataset"):
        task = getattr(config, f"{name}_task")
        dataset = getattr(config, name)
        if task is None:
            continue
        if dataset is None:
            setattr(config, name, task.dataset_config)
        else:
            task.dataset_config = dataset


def _note_remainder(config: RunConfig) -> None:
    """The last records are left out in training, counted in evaluation, whatever the YAML says."""
    for name, dropped in (("train_dataset", True), ("eval_dataset", False)):
        dataset = getattr(config, name)
        if dataset is not None and dataset.drop_remainder not in (None, dropped):
            what = "leaves out" if dropped else "counts"
            doing = "training" if dropped else "evaluation"
            get_logger().info(
                "%s.drop_remainder: %s has no effect here: %s %s the last partial batch",
                name,
                not dropped,
                doing,
                what,
            )


def _resolve_batch(config: RunConfig) -> None:
    """One micro-batch size for all, and the accumulation that global_batch_size asks for."""
    runner, train = config.runner_config, config.train_dataset
    given = train.batch_size if train else None
    if runner.batch_size is None:
        runner.batch_size = 1 if given is None else given
    if given is not None and given != runner.batch_size:
        get_logger().info(
            "train_dataset.batch_size %d gives way to runner_config.batch_size %d",
            given,
            runner.batch_size,
        )
    if train is not None:
        train.batch_size = runner.batch_size
    if config.eval_dataset is not None and config.eval_dataset.batch_size is None:
        config.eval_dataset.batch_size = runner.batch_size
    sequences = sequences_per_micro_step(config)
    wanted = runner.global_batch_size
    if (
        wanted
        and runner.gradient_accumulation_steps == 1
        and sequences > 0
        and wanted % sequences == 0
    ):
        runner.gradient_accumulation_steps = wanted // sequences
        if wanted > sequences:
            get_logger().info(
                "runner_config.gradient_accumulation_steps is %d, as global_batch_size %d says",
                runner.gradient_accumulation_steps,
                wanted,
            )


def _resolve_warmup(config: RunConfig) -> None:
    """Where both ways to give the warm-up are there and one says 0, the other one counts."""
    schedule = config.lr_schedule
    if schedule is None or schedule.warmup_ratio is None or schedule.warmup_steps is None:
        return
    zero, other = "warmup_ratio", "warmup_steps"
    if schedule.warmup_steps == 0:
        zero, other = other, zero
    if getattr(schedule, zero) == 0:
        if counts := getattr(schedule, other):
            get_logger().info("lr_schedule.%s 0 gives way to %s %g", zero, other, counts)
        setattr(schedule, zero, None)
