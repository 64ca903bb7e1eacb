"""The whole of a run's YAML: `RunConfig`, whose attributes are the top-level keys."""

from dataclasses import dataclass, field
from typing import Literal

from mixtral_ms.config.sections.data_section import (
    DatasetSection,
    DatasetTaskSection,
    MetricSection,
    ProcessorSection,
)
from mixtral_ms.config.sections.fields import inert, variants
from mixtral_ms.config.sections.generation_section import GenerationSection
from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.config.sections.parallel_section import (
    ParallelConfig,
    ParallelContext,
    RecomputeConfig,
)
from mixtral_ms.config.sections.run_modes import RUN_MODES, RunMode, RunModeName
from mixtral_ms.config.sections.training_section import (
    CALLBACKS,
    Callback,
    LrScheduleSection,
    OptimizerSection,
    RunnerConfig,
    RunnerWrapperSection,
    TensorBoardTopSection,
)

_MINDSPORE = "MindSpore's own setting is kept"
_BY_ENVIRONMENT = "MindSpore reads it from the environment: "
_NO_LAYER_SCALE = "all layers have one learning rate"
_NO_AUTO_TUNE = "data loading needs no tuning"
_NO_PROFILE = "use MindSpore's profiler around the run"


@dataclass
class TrainerSection:
    """`trainer`."""

    type: Literal["CausalLanguageModelingTrainer"] = "CausalLanguageModelingTrainer"
    model_name: str = "mixtral"
    """A name for the report; changes nothing else."""


@dataclass
class ArchSection:
    """`model.arch`."""

    type: Literal["LlamaForCausalLM", "MixtralForCausalLM"] = "MixtralForCausalLM"


@dataclass
class ModelSection:
    """`model`."""

    model_config: MixtralConfig = field(default_factory=MixtralConfig)
    arch: ArchSection = field(default_factory=ArchSection)


@dataclass
class JitConfig:
    """`context.jit_config`."""

    jit_level: Literal["O0", "O1", "O2"] = "O0"
    """How far an Ascend's graphs are optimised: O1 fuses small operators, O2 gives whole graphs to
    CANN's engine. A CPU has one level."""
    infer_boost: Literal["on", "off"] = inert("off", "prediction chooses its own kernels")


@dataclass
class AscendConfig:
    """`context.ascend_config`: what an Ascend's operators may do; told to MindSpore as given.

    Empty keeps MindSpore's own setting. A CPU is told none of it.
    """

    precision_mode: (
        Literal[
            "force_fp16",
            "allow_fp32_to_fp16",
            "allow_mix_precision",
            "must_keep_origin_dtype",
            "force_fp32",
            "allow_fp32_to_bf16",
            "allow_mix_precision_fp16",
            "allow_mix_precision_bf16",
        ]
        | None
    ) = None
    """Whether operators may compute in another format than they are given."""
    jit_compile: bool | None = None
    """Build operators for the shapes they get, instead of taking those that CANN brings."""
    atomic_clean_policy: Literal[0, 1] | None = None
    """0 clears the memory of operators that add up in it all at once, 1 one by one."""
    matmul_allow_hf32: bool | None = None
    """Let products of float32 matrices compute in HF32, which has 11 bits."""
    op_precision_mode: str | None = None
    """A file of CANN that says the precision of single operators."""
    hccl_watchdog: bool | None = None
    """End the process when a collective has failed on another rank."""
    conv_allow_hf32: bool = inert(False, "there are no convolutions")
    parallel_speed_up_json_path: str | None = inert(None, "ranks and messages are explicit here")
    topo_order: dict | None = inert(None, "exec_order says it for all graphs")


@dataclass
class ContextSection:
    """`context`: MindSpore's run-time settings."""

    mode: Literal[0, 1] = 0
    """0 compiles the network to a graph; 1 runs it operator by operator, to debug."""
    device_target: Literal["CPU", "Ascend"] = "Ascend"
    device_id: int = 0
    max_device_memory: str = "1024GB"
    """Memory of an Ascend device that may be used, such as "58GB"."""
    max_call_depth: int = inert(10000, _MINDSPORE)
    deterministic: Literal["ON", "OFF"] = "OFF"
    """ON gives the same bits in every run on Ascend, slower; a CPU always does."""
    jit_config: JitConfig = field(default_factory=JitConfig)
    ascend_config: AscendConfig = field(default_factory=AscendConfig)
    exec_order: Literal["bfs", "dfs"] | None = None
    """Order of a graph's operators on Ascend: bfs takes all that are ready, dfs follows one result
    to its end, which holds fewer at once. Empty keeps MindSpore's own."""
    memory_optimize_level: Literal["O0", "O1"] = "O0"
    """O1 lets an Ascend's graphs use memory again more eagerly."""
    mempool_block_size: str | None = None
    """By how much an Ascend's memory pool grows, such as "1GB"; empty keeps MindSpore's own."""
    save_graphs: bool | Literal[0, 1, 2, 3] = False
    """Write the graphs that are compiled, to report a fault: True is 2, 3 writes most."""
    save_graphs_path: str = "./graph"
    """Where save_graphs writes them."""
    enable_graph_kernel: bool = inert(False, "jit_config.jit_level O1 fuses operators")
    graph_kernel_flags: str = inert("", _BY_ENVIRONMENT + "MS_DEV_GRAPH_KERNEL_FLAGS")
    affinity_cpu_list: list[str] | dict | None = None
    """Cores that an Ascend's process runs on: ranges such as "0-23", or a list of them for each
    device, {device0: ["0-23"], ...}. MSRUN_BIND_CORE of the launcher shares them out evenly."""
    runtime_num_threads: int | None = inert(None, "OMP_NUM_THREADS says it")
    enable_reduce_precision: bool = inert(True, "ascend_config.precision_mode says it")
    enable_compile_cache: bool = inert(False, _BY_ENVIRONMENT + "MS_COMPILER_CACHE_ENABLE")
    compile_cache_path: str | None = inert(None, _BY_ENVIRONMENT + "MS_COMPILER_CACHE_PATH")
    print_file_path: str | None = inert(None, "the log goes to stderr")
    save_dump_path: str | None = inert(None, _BY_ENVIRONMENT + "MINDSPORE_DUMP_CONFIG")
    enable_dump: bool = inert(False, _BY_ENVIRONMENT + "MINDSPORE_DUMP_CONFIG")
    pynative_synchronize: bool = False
    """Wait for every operator on Ascend, so that an error names the one that failed; slow."""


@dataclass
class AiccConfig:
    """`aicc_config`: accepted without effect."""

    obs_path: str = inert("obs url", "files stay in output_dir")
    upload_frequence: int = inert(1, "files stay in output_dir")
    keep_last: bool = inert(False, "files stay in output_dir")


@dataclass
class RunConfig:
    """One run: what, on which data, how long, on which device."""

    run_mode: RunModeName = "train"
    seed: int = 0
    """The same seed gives the same run."""
    output_dir: str = "./output"
    trainer: TrainerSection = field(default_factory=TrainerSection)
    # checkpoints
    load_checkpoint: str | None = ""
    """Weights to start from: any folder or file that docs/checkpoints.md lists."""
    adapter: str | None = ""
    """A LoRA run's checkpoints: to be added to load_checkpoint, or trained on with pet_config."""
    resume_training: bool | str = False
    """True continues from the newest checkpoint, a name from that one."""
    allow_partial: bool = False
    """Load what fits of load_checkpoint, name the rest in the log and initialise it."""
    auto_trans_ckpt: bool = False
    """Either way each rank reads its part of any checkpoint."""
    no_shared_storage: bool = False
    """output_dir is not one folder for all hosts: each keeps its own ranks' part of checkpoints."""
    src_strategy_path_or_dir: str | None = ""
    """Strategy files of load_checkpoint, where they do not lie beside it."""
    load_ckpt_format: Literal["safetensors", "ckpt"] = inert(
        "safetensors", "the format is recognised from the files"
    )
    transform_process_num: int = inert(1, "each rank reads only what it needs")
    remove_redundancy: bool = inert(False, "each rank writes what it holds")
    only_save_strategy: bool = inert(False, "strategy files lie beside every checkpoint")
    pretrained_model_dir: str | None = inert(None, "load_checkpoint names the weights")
    resume_or_finetune_checkpoint: str = inert("", "load_checkpoint and resume_training say it")
    # data
    train_dataset: DatasetSection | None = None
    train_dataset_task: DatasetTaskSection | None = None
    eval_dataset: DatasetSection | None = None
    eval_dataset_task: DatasetTaskSection | None = None
    # training
    runner_config: RunnerConfig = field(default_factory=RunnerConfig)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    lr_schedule: LrScheduleSection | None = None
    runner_wrapper: RunnerWrapperSection = field(default_factory=RunnerWrapperSection)
    callbacks: list[Callback] = variants(CALLBACKS)
    tensorboard: TensorBoardTopSection | None = None
    # evaluation
    do_eval: bool = False
    """Evaluate during training."""
    eval_step_interval: int = -1
    """Evaluate every so many steps; -1 means not by steps."""
    eval_epoch_interval: int = 1
    """Evaluate at the end of every so many epochs; -1 means not by epochs."""
    metric: MetricSection = field(default_factory=MetricSection)
    eval_callbacks: list[Callback] = variants(CALLBACKS)
    # network
    model: ModelSection = field(default_factory=ModelSection)
    moe_config: MoEConfig = field(default_factory=MoEConfig)
    """The same object as model.model_config.moe_config."""
    processor: ProcessorSection = field(default_factory=ProcessorSection)
    # prediction
    predict_data: list[str] | str | None = None
    """Prompts, files of prompts, or - for standard input."""
    predict_batch_size: int | None = None
    """Most prompts that are answered at once; empty means 32. It changes no answer."""
    weight_dtype: Literal["float32", "float16", "int8"] = "float32"
    """Format of the weights in prediction, int8 with a scale a row; evaluation says what it
    costs."""
    generation: GenerationSection = field(default_factory=GenerationSection)
    modal_type: list[str] | str | None = inert(None, "prompts are text")
    adapter_id: list[str] | str | None = inert(None, "adapters are merged before prediction")
    # ranks and device
    use_parallel: bool = False
    parallel: ParallelContext = field(default_factory=ParallelContext)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batch_interleave_num: int = inert(1, "micro batches are not interleaved")
    recompute_config: RecomputeConfig = field(default_factory=RecomputeConfig)
    context: ContextSection = field(default_factory=ContextSection)
    # accepted without effect
    auto_tune: bool = inert(False, _NO_AUTO_TUNE)
    filepath_prefix: str = inert("./autotune", _NO_AUTO_TUNE)
    autotune_per_step: int = inert(10, _NO_AUTO_TUNE)
    profile: bool = inert(False, _NO_PROFILE)
    profile_start_step: int = inert(1, _NO_PROFILE)
    profile_stop_step: int = inert(10, _NO_PROFILE)
    profile_rank_ids: list[int] | None = inert(None, _NO_PROFILE)
    profile_pipeline: bool = inert(False, _NO_PROFILE)
    profile_level: int = inert(1, _NO_PROFILE)
    profile_output: str | None = inert(None, _NO_PROFILE)
    init_start_profile: bool = inert(False, _NO_PROFILE)
    profile_communication: bool = inert(False, _NO_PROFILE)
    profile_memory: bool = inert(True, _NO_PROFILE)
    mstx: bool = inert(False, _NO_PROFILE)
    layer_scale: bool = inert(False, _NO_LAYER_SCALE)
    layer_decay: float = inert(0.65, _NO_LAYER_SCALE)
    lr_scale: bool = inert(False, _NO_LAYER_SCALE)
    lr_scale_factor: float = inert(256, _NO_LAYER_SCALE)
    remote_save_url: str | None = inert(None, "files stay in output_dir")
    save_file: str | None = inert(None, "files stay in output_dir")
    aicc_config: AiccConfig | None = None
    data_skip_steps: int | None = inert(None, "resume_training finds the position in the data")
    ignore_data_skip: bool = inert(False, "resume_training finds the position in the data")
    data_size: int | None = inert(None, "the loader counts the records")
    device_num: int | None = inert(None, "the launcher says how many processes there are")
    register_path: str | None = inert(None, "the network is part of this package")
    use_legacy: bool = inert(True, "there is one network")
    train_precision_sync: bool | None = inert(None, "context.deterministic says it")
    infer_precision_sync: bool | None = inert(None, "context.deterministic says it")
    print_separate_loss: bool = inert(False, "the loss's parts are always printed")
    monitor_config: dict | None = inert(None, "metrics.jsonl holds what is monitored")

    @property
    def mode(self) -> RunMode:
        """What run_mode means."""
        return RUN_MODES[self.run_mode]
