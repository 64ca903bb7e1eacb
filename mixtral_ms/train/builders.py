"""From a configuration to the objects of a run."""

import dataclasses
from pathlib import Path
from typing import Literal, TypeVar

from mindspore import dtype as mstype

from mixtral_ms.checkpoint.formats.tensor_source import TensorSource
from mixtral_ms.config import RunConfig
from mixtral_ms.config.derived.pipeline_stages import keeps_layer_inputs, layers_per_stage
from mixtral_ms.config.derived.recomputed_layers import names_operators, selected_layers
from mixtral_ms.config.loading.resolve import (
    dataset_of,
    is_zero,
    micro_batch_size,
    micro_batches,
    sequences_per_step,
)
from mixtral_ms.config.loading.step_choices import step_choices
from mixtral_ms.config.sections.data_section import DatasetSection
from mixtral_ms.config.sections.training_section import (
    MetricsWriterSection,
    SampleMonitorSection,
    TensorBoardSection,
)
from mixtral_ms.convert.adapters.lora_weights import open_adapter
from mixtral_ms.convert.run_weights import open_run_weights
from mixtral_ms.data.loader.record_loader import RecordLoader
from mixtral_ms.data.mindrecord.reader import shared_files
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.model.nn.weight_init import initialize
from mixtral_ms.parallel.comm.gradient_reduction import shard_groups
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.objectives.causal_lm import CausalLMObjective
from mixtral_ms.train.objectives.objective import MakeObjective
from mixtral_ms.train.report.metrics import METRICS_FILE
from mixtral_ms.train.report.step_monitor import StepMonitor
from mixtral_ms.train.sample_answers import Samples
from mixtral_ms.train.state.parameter_loading import load_parameters
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.lr_schedule import Schedule, build_schedule, constant_schedule
from mixtral_ms.train.step.train_step import TrainStep
from mixtral_ms.train.step.working_weights import WorkingWeights

Section = TypeVar("Section")


def without_adapters(config: RunConfig) -> RunConfig:
    """For a network that is not trained: its weights have the adapter, if one is given, added."""
    network = config.model.model_config
    if network.pet_config is None:
        return config
    if not config.adapter:
        get_logger().warning(
            "model_config.pet_config has no effect on run_mode %s: set adapter to the checkpoints "
            "of the LoRA run",
            config.run_mode,
        )
    plain = dataclasses.replace(network, pet_config=None)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, model_config=plain))


Values = Literal["initial", "restored", "none"]
"""Of a network's parameters: `initial` are drawn, or read where the configuration names a file;
`restored` are a checkpoint's, which is put in afterwards; `none` are zeros that nobody reads."""


def build_network(
    config: RunConfig, mesh: Mesh, *, values: Values = "initial"
) -> MixtralForCausalLM:
    """The rank's part of the network. Its shapes are those of a micro batch.

    Nothing is drawn that a file or a checkpoint then overwrites.
    """
    network = MixtralForCausalLM(
        config.model.model_config, seed=None, batch_size=micro_batch_size(config), mesh=mesh
    )
    _say_what_is_not_recomputed(config)
    _recompute(config, network)
    if values == "none":
        return network
    initial = values == "initial"
    adapters = network.config.pet_config is not None
    if initial:
        loaded = bool(config.load_checkpoint) and not config.allow_partial
        initialize(network, network.config, config.seed, mesh, adapters_only=loaded)
    if config.load_checkpoint and (adapters or initial):
        weights = open_network_weights(config)
        load_parameters(network, weights, partial=config.allow_partial)
        get_logger().info("weights from %s", weights.path)
    if adapters and config.adapter and initial:
        adapter = open_adapter(Path(config.adapter), network.config)
        load_parameters(network, adapter.tensors, adapters=True)
        get_logger().info("adapter from %s", adapter.path)
    return network


def _recompute(config: RunConfig, network: MixtralForCausalLM) -> None:
    section, mesh = config.recompute_config, network.mesh
    if keeps_layer_inputs(mesh.grid, mesh.stage):
        return  # it computes whole layers again in any case
    if section.recompute:
        network.recompute_layers()
        return
    layers = layers_per_stage(network.config, mesh.grid.pipeline_stage)
    network.recompute_attention(selected_layers(section.select_recompute, layers)[mesh.stage])


def _say_what_is_not_recomputed(config: RunConfig) -> None:
    section = config.recompute_config
    if names_operators(section.select_recompute):
        get_logger().info(
            "recompute_config.select_recompute has no effect: its patterns are of MindFormers' "
            "operators; give True, or a number of layers for each stage"
        )
    elif section.recompute and section.select_recompute:
        get_logger().info(
            "recompute_config.select_recompute has no effect: recompute is on for whole layers"
        )


def build_train_step(
    config: RunConfig,
    network: MixtralForCausalLM,
    optimizer: AdamW,
    objective: MakeObjective = CausalLMObjective,
) -> TrainStep:
    """The step of the run, carried out as its keys and the device say."""
    wrapper, choices = config.runner_wrapper, step_choices(config)
    norm = wrapper.max_grad_norm if wrapper.use_clip_grad else None
    working = None
    if network.dtype != mstype.float32 and choices.working_weights:
        twin = MixtralForCausalLM(
            config.model.model_config, batch_size=micro_batch_size(config), share=network
        )
        _recompute(config, twin)
        working = WorkingWeights(network, twin)
    elif wrapper.working_weights:
        get_logger().info(
            "runner_wrapper.working_weights True has no effect: weights are used in float32"
        )
    sharding = config.parallel.parallel_optimizer_config
    if sharding.gradient_accumulation_shard and not choices.cut_sums:
        get_logger().info(
            "parallel.parallel_optimizer_config.gradient_accumulation_shard True has no effect: "
            "without enable_parallel_optimizer no moments are cut"
        )
    accumulation = micro_batches(config)
    return TrainStep(network, optimizer, accumulation, norm, objective, choices, working)


def open_network_weights(config: RunConfig) -> TensorSource:
    """Those of load_checkpoint, with the adapter added where the network has none of its own."""
    if config.model.model_config.pet_config is not None:
        config = dataclasses.replace(config, adapter="")
    return open_run_weights(config)


def build_loader(
    config: RunConfig, section: DatasetSection, mesh: Mesh, *, training: bool
) -> RecordLoader:
    """The loader of this rank's share of train_dataset or eval_dataset."""
    model, wanted = config.model.model_config, section.data_loader.num_samples
    loader = RecordLoader(
        section,
        seq_length=model.seq_length,
        batch_size=section.batch_size or micro_batch_size(config),
        seed=config.seed,
        shuffle=training and section.data_loader.shuffle,
        keep_partial=not training,
        vocab_size=model.vocab_size,
        pad_token_id=model.pad_token_id,
        ignore_token_id=model.ignore_token_id,
        tokenizer_file=config.processor.tokenizer.vocab_file,
        rank=mesh.data_index,
        world=mesh.grid.data_parallel,
        part=mesh.context_index,
        parts=mesh.grid.context_parallel,
    )
    if wanted and wanted > loader.records:
        get_logger().info(
            "%s_dataset.data_loader.num_samples is %d, and the data has %d records",
            "train" if training else "eval",
            wanted,
            loader.records,
        )
    return loader


def build_eval_loader(config: RunConfig, mesh: Mesh, train: RecordLoader) -> RecordLoader:
    """The loader of eval_dataset; says when it holds what is trained on."""
    loader = build_loader(config, dataset_of(config, training=False), mesh, training=False)
    shared = shared_files(train.data, loader.data)
    if shared or loader.fingerprint == train.fingerprint:
        what = f"{shared[0]} is" if len(shared) == 1 else f"{len(shared) or 'all'} files are"
        get_logger().warning(
            "eval_dataset is not held back: %s in train_dataset too, so the evaluation's loss says "
            "what was learnt by heart; name other data in eval_dataset.data_loader.dataset_dir",
            what,
        )
    return loader


def build_optimizer(config: RunConfig, network: MixtralForCausalLM) -> AdamW:
    """AdamW, whichever of its names the YAML uses."""
    section, parameters = config.optimizer, network.trainable_params()
    if section.use_fused is not None and config.context.device_target == "CPU":
        get_logger().info("optimizer.use_fused %s has no effect on CPU", section.use_fused)
    shards = {}
    if is_zero(config):
        shards = shard_groups(network.config, network.mesh, [one.name for one in parameters])
    return AdamW(
        parameters,
        section.moment_decay,
        section.eps,
        section.weight_decay,
        shards,
        fused=step_choices(config).fused_update,
    )


def build_learning_rate(config: RunConfig, total_steps: int) -> Schedule:
    """lr_schedule, or the optimizer's constant rate without one. Raises UserError without both."""
    if config.lr_schedule is not None:
        return build_schedule(config.lr_schedule, total_steps)
    if (rate := config.optimizer.learning_rate) is None:
        raise UserError("give lr_schedule or optimizer.learning_rate: there is no learning rate")
    return constant_schedule(rate)


def build_monitor(config: RunConfig, mesh: Mesh, last_step: int) -> StepMonitor:
    """What times and describes the steps of the run, up to `last_step`."""
    return StepMonitor(
        config.model.model_config,
        config.context.device_target,
        sequences_per_step(config) * config.model.model_config.seq_length,
        last_step,
        config.runner_config.peak_tflops,
        mesh.world_size,
    )


def callback(config: RunConfig, kind: type[Section]) -> Section | None:
    """The first callback section of a kind, None without one."""
    return next((c for c in config.callbacks if isinstance(c, kind)), None)


def build_samples(config: RunConfig, network: MixtralForCausalLM) -> Samples | None:
    """What SampleMonitor asks, out of eval_dataset or else of the training's; None without."""
    section = callback(config, SampleMonitorSection)
    if section is None:
        return None
    grid = network.mesh.grid
    if grid.model_parallel * grid.pipeline_stage * grid.context_parallel > 1:
        get_logger().info(
            "SampleMonitor has no effect here: it asks a network that is whole on each rank, not "
            "one cut by model_parallel, pipeline_stage or context_parallel"
        )
        return None
    held_back = bool(config.eval_dataset and config.eval_dataset.data_loader.dataset_dir)
    data = dataset_of(config, training=not held_back)
    # all ranks ask the same, as experts may be anywhere
    loader = build_loader(config, data, Mesh(), training=not held_back)
    return Samples(config, section, network, loader)


def metrics_path(config: RunConfig) -> Path:
    """The run's metrics file."""
    section = callback(config, MetricsWriterSection)
    named = section.path if section else None
    return Path(named or Path(config.output_dir) / METRICS_FILE)


def tensorboard_folder(config: RunConfig) -> str | None:
    """Where TensorBoard events go; None when they were not asked for."""
    section = callback(config, TensorBoardSection)
    if section is None:
        return None
    return section.log_dir or f"{config.output_dir}/tensorboard"
