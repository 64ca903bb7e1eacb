"""Sections about a training run: optimizer, schedule, loss scale, callbacks, runner."""

from dataclasses import dataclass
from typing import Literal

from mixtral_ms.config.sections.fields import gives_way, inert

OptimizerType = Literal[
    "AdamW", "FP32StateAdamWeightDecay", "FusedCastAdamWeightDecay", "AdamWeightDecay"
]
_ALWAYS_MEASURED = "metrics.jsonl always holds it"


@dataclass
class RunnerConfig:
    """`runner_config`: how long and in what portions."""

    epochs: int = 1
    batch_size: int | None = None
    """Sequences of a micro batch of one rank; empty means train_dataset.batch_size."""
    gradient_accumulation_steps: int = 1
    """Gradient accumulation: micro batches averaged before one optimizer step."""
    global_batch_size: int | None = None
    """Sequences of one optimizer step over all ranks; sets gradient_accumulation_steps if given."""
    max_steps: int | None = None
    """End training (and the learning-rate schedule) after this many steps, whatever `epochs`."""
    stop_at_step: int | None = None
    """Stop early at this step with a checkpoint; the schedule stays as it is."""
    peak_tflops: float | None = None
    """The device's peak in TFLOP/s, for the MFU; empty measures a CPU, and gives none elsewhere."""
    sink_mode: bool = inert(False, "the host gives every step its batches, which are few bytes")
    sink_size: int = inert(1, "a step is one optimizer step, sink mode or not")
    num_classes: int | None = inert(None, "there are vocab_size classes")
    image_size: int | None = inert(None, "there are no images")
    initial_epoch: int = inert(0, "resume_training continues where the checkpoint stands")
    initial_step: int = inert(0, "resume_training continues where the checkpoint stands")
    has_trained_epoches: int | None = inert(None, "resume_training reads it")
    has_trained_steps: int | None = inert(None, "resume_training reads it")
    sink_size_auto: bool = inert(False, "a step is one optimizer step, sink mode or not")


@dataclass
class OptimizerSection:
    """`optimizer`: Adam with decoupled weight decay (none on norms and biases)."""

    type: OptimizerType = "AdamW"
    learning_rate: float | None = gives_way("lr_schedule.learning_rate")
    """Used only without lr_schedule."""
    betas: list[float] | None = None
    """Decay of the two moments, [0.9, 0.95] for example; the same as beta1 and beta2."""
    beta1: float | None = None
    beta2: float | None = None
    eps: float = 1e-8
    weight_decay: float = 0.0
    """0.1 is usual for pretraining, 0 for fine-tuning."""
    use_fused: bool | None = None
    """Update each tensor by one operator (aclnnApplyAdamWV2), on Ascend; without effect on a CPU,
    which has its own. Empty: True."""
    swap: bool = inert(False, "optimizer state stays on the device")

    @property
    def moment_decay(self) -> tuple[float, float]:
        """(beta1, beta2), whichever way they were given; (0.9, 0.999) when they were not."""
        first, second = self.betas if self.betas else (None, None)
        beta1 = self.beta1 if self.beta1 is not None else first
        beta2 = self.beta2 if self.beta2 is not None else second
        return (0.9 if beta1 is None else beta1, 0.999 if beta2 is None else beta2)


@dataclass
class LrScheduleSection:
    """`lr_schedule`: learning rate against step."""

    type: Literal["CosineWithWarmUpLR", "ConstantWarmUpLR", "LinearWithWarmUpLR"] = (
        "CosineWithWarmUpLR"
    )
    learning_rate: float = 1e-5
    """The highest rate, reached at the end of the warm-up."""
    lr_end: float = 0.0
    """The rate that the fall would reach one step behind the last."""
    warmup_ratio: float | None = None
    """Part of all steps that is warm-up; or give warmup_steps."""
    warmup_steps: int | None = None
    """Steps of warm-up; or give warmup_ratio."""
    warmup_lr_init: float = 0.0
    """The rate at the first step of the warm-up."""
    total_steps: int = -1
    """Steps the schedule spans; -1 means the steps of this run."""
    num_cycles: float = 0.5
    """Cosine waves after the warm-up; 0.5 ends at lr_end."""
    lr_scale: bool = inert(False, "the learning rate is used as given")
    lr_scale_factor: float = inert(256, "the learning rate is used as given")
    layer_scale: bool = inert(False, "all layers have one learning rate")
    layer_decay: float = inert(0.65, "all layers have one learning rate")


@dataclass
class ScaleSenseSection:
    """`runner_wrapper.scale_sense`: the loss scale of float16 training."""

    type: Literal["DynamicLossScaleUpdateCell", "AdaptiveLossScaleUpdateCell"] = (
        "DynamicLossScaleUpdateCell"
    )
    loss_scale_value: float = 65536.0
    """The scale at the start."""
    scale_factor: float = 2.0
    """Grow and shrink by this factor."""
    scale_window: int = 1000
    """Grow after this many steps in a row without overflow."""
    min_loss_scale: float = 1.0
    """The scale never shrinks below this."""
    max_scale_window: int = inert(1000, "scale_window is constant")
    min_scale_window: int = inert(20, "scale_window is constant")


@dataclass
class RunnerWrapperSection:
    """`runner_wrapper`: what one step does around the gradients."""

    type: Literal["MFTrainOneStepCell", "MFPipelineWithLossScaleCell"] = "MFTrainOneStepCell"
    use_clip_grad: bool = True
    """Scale gradients down to max_grad_norm where their global norm is larger."""
    max_grad_norm: float = 1.0
    scale_sense: ScaleSenseSection | float | None = None
    """Loss scale of float16 training: a section, a fixed number, or nothing (no scale)."""
    max_skipped_steps: int = 20
    """Stop, naming the first layer that is not finite, after this many skipped steps in a row."""
    one_host_read: bool | None = None
    """Add losses, figures and the gradient norm up on the device, in float32, and read them once a
    step; False reads them one by one and adds in float64. Empty: True on Ascend, False on a CPU."""
    working_weights: bool | None = None
    """Cast the matrices (embedding and router left out) to compute_dtype once a step instead of in
    every micro batch; the copy takes 2 bytes a weight. Without effect where compute_dtype is
    float32. Empty: True on Ascend, False on a CPU."""
    local_norm: bool = inert(False, _ALWAYS_MEASURED)
    calculate_per_token_loss: bool = inert(False, "the loss is always per token")


@dataclass
class LossMonitorSection:
    """`- type: MFLossMonitor`: one line a step in the log."""

    type: Literal["MFLossMonitor"] = "MFLossMonitor"
    per_print_times: int = 1
    """Print every so many steps."""
    learning_rate: float | None = inert(None, "the schedule's rate is printed")
    micro_batch_num: int | None = inert(None, "the loss is the mean over micro batches")
    micro_batch_interleave_num: int | None = inert(None, "the loss is the mean over them")
    gradient_accumulation_steps: int | None = inert(None, "the loss is the mean over them")
    origin_epochs: int | None = inert(None, "the Trainer knows")
    dataset_size: int | None = inert(None, "the Trainer knows")
    initial_epoch: int | None = inert(None, "the Trainer knows")
    initial_step: int | None = inert(None, "the Trainer knows")
    global_batch_size: int | None = inert(None, "the Trainer knows")
    calculate_per_token_loss: bool = inert(False, "the loss is always per token")
    print_separate_loss: bool = inert(False, "the loss's parts are always printed")


@dataclass
class CheckpointMonitorSection:
    """`- type: CheckpointMonitor`: checkpoints during training."""

    type: Literal["CheckpointMonitor", "CheckpointMointor"] = "CheckpointMonitor"
    prefix: str = "mixtral"
    """Checkpoint names start with it."""
    directory: str | None = None
    """Where checkpoints go; empty means output_dir/checkpoint."""
    save_checkpoint_steps: int = 1000
    """Save every so many steps; the end of training is always saved."""
    save_checkpoint_seconds: int = 0
    """Save also when so many seconds have passed since the last time; 0 means never."""
    keep_checkpoint_max: int = 5
    """Keep the newest so many and delete older ones."""
    async_save: bool = False
    """Write in the background while training goes on; what is in `latest` is always whole."""
    checkpoint_format: Literal["safetensors", "ckpt"] = inert(
        "safetensors", "checkpoints are safetensors"
    )
    integrated_save: bool = inert(False, "each rank writes what it holds")
    keep_checkpoint_per_n_minutes: int = inert(0, "keep_checkpoint_max says what is kept")
    save_network_params: bool = inert(False, "parameters lie apart from optimizer state")
    save_trainable_params: bool = inert(False, "all parameters are saved")
    save_optimizer: bool = inert(True, "a checkpoint can always be resumed")
    remove_redundancy: bool = inert(False, "each rank writes what it holds")
    async_save_mode: str = inert("thread", "async_save says it")
    exception_save: bool = inert(False, "signals, and errors between steps, always save")
    embedding_size: int | None = inert(None, "the Trainer knows")
    embedding_local_norm_threshold: float | None = inert(None, _ALWAYS_MEASURED)
    use_checkpoint_health_monitor: bool = inert(False, "every checkpoint has a manifest")
    health_ckpts_record_dir: str | None = inert(None, "every checkpoint has a manifest")


@dataclass
class TensorBoardSection:
    """`- type: TensorBoard`: the metrics of every step as TensorBoard events."""

    type: Literal["TensorBoard"] = "TensorBoard"
    log_dir: str | None = None
    """Where events go; empty means output_dir/tensorboard."""


@dataclass
class MetricsWriterSection:
    """`- type: MetricsWriter`: metrics.jsonl; on without being named."""

    type: Literal["MetricsWriter"] = "MetricsWriter"
    path: str | None = None
    """The file; empty means output_dir/metrics.jsonl."""
    per_layer_steps: int = 1
    """Write the per-layer expert load every so many steps; larger keeps the file small."""


@dataclass
class ReportSection:
    """`- type: Report`: report.html and its pictures at the end; on without being named."""

    type: Literal["Report"] = "Report"
    enabled: bool = True
    """False leaves the report out."""


@dataclass
class SampleMonitorSection:
    """`- type: SampleMonitor`: the report shows answers before and after training.

    Prompts are what stands before the supervised part of records of eval_dataset, or without one of
    train_dataset. Every token of an answer costs a forward pass.
    """

    type: Literal["SampleMonitor"] = "SampleMonitor"
    rows: int = 3
    """How many prompts."""
    max_new_tokens: int = 24
    """Most tokens of an answer."""


@dataclass
class ObsMonitorSection:
    """`- type: ObsMonitor`: accepted without effect, files stay in output_dir."""

    type: Literal["ObsMonitor"] = "ObsMonitor"
    src_dir: str | None = inert(None, "files stay in output_dir")
    target_dir: str | None = inert(None, "files stay in output_dir")
    step_upload_frequence: int = inert(100, "files stay in output_dir")
    epoch_upload_frequence: int = inert(-1, "files stay in output_dir")
    keep_last: bool = inert(True, "files stay in output_dir")


@dataclass
class SummaryMonitorSection:
    """`- type: SummaryMonitor`: accepted without effect, `TensorBoard` writes events."""

    type: Literal["SummaryMonitor"] = "SummaryMonitor"
    summary_dir: str | None = inert(None, "use `- type: TensorBoard`")
    collect_freq: int = inert(10, "use `- type: TensorBoard`")


@dataclass
class ProfileMonitorSection:
    """`- type: ProfileMonitor`: accepted without effect."""

    type: Literal["ProfileMonitor"] = "ProfileMonitor"
    start_step: int = inert(1, "profiling is not a callback here")
    stop_step: int = inert(10, "profiling is not a callback here")
    output_path: str | None = inert(None, "profiling is not a callback here")


@dataclass
class TensorBoardTopSection:
    """Top-level `tensorboard`: MindFormers' way to ask for the `TensorBoard` callback."""

    tensorboard_dir: str | None = None
    """The same as log_dir of the callback."""
    tensorboard_queue_size: int = inert(10, "events are written at once")
    log_loss_scale_to_tensorboard: bool = inert(True, "every metric is written")
    log_timers_to_tensorboard: bool = inert(True, "every metric is written")
    log_expert_load_to_tensorboard: bool = inert(False, "every metric is written")


CALLBACKS: dict[str, type] = {
    "MFLossMonitor": LossMonitorSection,
    "CheckpointMonitor": CheckpointMonitorSection,
    "CheckpointMointor": CheckpointMonitorSection,
    "TensorBoard": TensorBoardSection,
    "MetricsWriter": MetricsWriterSection,
    "Report": ReportSection,
    "SampleMonitor": SampleMonitorSection,
    "ObsMonitor": ObsMonitorSection,
    "SummaryMonitor": SummaryMonitorSection,
    "ProfileMonitor": ProfileMonitorSection,
}
Callback = (
    LossMonitorSection
    | CheckpointMonitorSection
    | TensorBoardSection
    | MetricsWriterSection
    | ReportSection
    | SampleMonitorSection
    | ObsMonitorSection
    | SummaryMonitorSection
    | ProfileMonitorSection
)
