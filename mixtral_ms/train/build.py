"""From a configuration to the objects of a run."""

import dataclasses
from pathlib import Path

import mindspore

from mixtral_ms.config import RunConfig
from mixtral_ms.config.data_sections import DatasetSection
from mixtral_ms.config.training_sections import (
    MetricsWriterSection,
    SampleMonitorSection,
    TensorBoardSection,
)
from mixtral_ms.convert.lora import open_adapter
from mixtral_ms.convert.weights import open_weights
from mixtral_ms.data.loader import RecordLoader
from mixtral_ms.log import get_logger
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.checkpointing import load_parameters
from mixtral_ms.train.metrics import METRICS_FILE
from mixtral_ms.train.optimizer import AdamW
from mixtral_ms.train.samples import Samples
from mixtral_ms.train.schedule import Schedule, build_schedule, constant_schedule


def set_up_device(config: RunConfig) -> None:
    """MindSpore's mode and device as `context` says."""
    context = config.context
    mindspore.set_context(mode=context.mode)
    if context.device_target == "CPU":
        mindspore.set_device("CPU")
        if config.runner_config.sink_mode:
            get_logger().info("runner_config.sink_mode True has no effect on CPU")
    else:
        mindspore.set_device(context.device_target, context.device_id)
        mindspore.set_context(max_device_memory=context.max_device_memory)
        mindspore.set_deterministic(context.deterministic == "ON")


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


def build_network(config: RunConfig) -> MixtralForCausalLM:
    """The network with the shapes of a micro batch, its weights fresh or from load_checkpoint."""
    network = MixtralForCausalLM(
        config.model.model_config, seed=config.seed, batch_size=config.runner_config.batch_size
    )
    if config.recompute_config.recompute:
        network.recompute_layers()
    adapters = network.config.pet_config is not None
    if config.load_checkpoint and (adapters or not config.resume_training):
        _load_weights(config, network)
    if adapters and config.adapter and not config.resume_training:
        adapter = open_adapter(Path(config.adapter), network.config)
        load_parameters(network.trainable_params(), adapter.tensors)
        get_logger().info("adapter from %s", adapter.path)
    return network


def _load_weights(config: RunConfig, network: MixtralForCausalLM) -> None:
    """Those of load_checkpoint, with the adapter added where the network has no place for it."""
    strategy = config.src_strategy_path_or_dir
    merged = config.adapter and network.config.pet_config is None
    weights = open_weights(
        Path(config.load_checkpoint),
        network.config,
        strategy=Path(strategy) if strategy else None,
        allow_partial=config.allow_partial,
        adapter=Path(config.adapter) if merged else None,
    )
    load_parameters(network.weights(), weights, partial=config.allow_partial)
    get_logger().info("weights from %s", weights.path)


def build_loader(config: RunConfig, section: DatasetSection, *, training: bool) -> RecordLoader:
    """The loader of train_dataset or eval_dataset."""
    model = config.model.model_config
    return RecordLoader(
        section,
        seq_length=model.seq_length,
        batch_size=section.batch_size or config.runner_config.batch_size,
        seed=config.seed,
        shuffle=training and section.data_loader.shuffle,
        keep_partial=not training,
        vocab_size=model.vocab_size,
        pad_token_id=model.pad_token_id,
        ignore_token_id=model.ignore_token_id,
        tokenizer_file=config.processor.tokenizer.vocab_file,
    )


def build_optimizer(config: RunConfig, network: MixtralForCausalLM) -> AdamW:
    """AdamW, whichever of its names the YAML uses."""
    section = config.optimizer
    return AdamW(
        network.trainable_params(), section.moment_decay, section.eps, section.weight_decay
    )


def build_learning_rate(config: RunConfig, total_steps: int) -> Schedule:
    """lr_schedule, or the optimizer's constant rate without one."""
    if config.lr_schedule is not None:
        return build_schedule(config.lr_schedule, total_steps)
    return constant_schedule(config.optimizer.learning_rate)


def callback(config: RunConfig, kind: type) -> object | None:
    """The first callback section of a kind, None without one."""
    return next((c for c in config.callbacks if isinstance(c, kind)), None)


def build_samples(
    config: RunConfig, network: MixtralForCausalLM, loader: RecordLoader
) -> Samples | None:
    """What SampleMonitor asks, of rows of eval_dataset or else of the training's; None without."""
    section = callback(config, SampleMonitorSection)
    if section is None:
        return None
    held_back = config.eval_dataset and config.eval_dataset.data_loader.dataset_dir
    if held_back:
        loader = build_loader(config, config.eval_dataset, training=False)
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
