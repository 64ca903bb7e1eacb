"""A run's YAML the way users of MindFormers write it: its keys, its anchors, its habits."""

MINDFORMERS_YAML = """\
seed: 0
output_dir: './output'
load_checkpoint: ""
src_strategy_path_or_dir: ''
auto_trans_ckpt: False
only_save_strategy: False
resume_training: False
run_mode: 'finetune'
load_ckpt_format: 'ckpt'

trainer:
  type: CausalLanguageModelingTrainer
  model_name: 'mixtral-8x7b'
do_eval: false
eval_step_interval: -1
eval_epoch_interval: 50

runner_config:
  epochs: 3
  batch_size: 1
  sink_mode: True
  sink_size: 2
  gradient_accumulation_steps: 8

optimizer:
  type: FP32StateAdamWeightDecay
  beta1: 0.9
  beta2: 0.95
  eps: 1.e-8
  learning_rate: 3e-4

moe_config:
  expert_num: 8
  capacity_factor: 1.1
  aux_loss_factor: 0.05
  num_experts_chosen: 2
  routing_policy: "TopkRouterV2"
  enable_sdrop: True
  router_dense_type: "float32"
  use_fused_ops_topkrouter: False
  balance_via_topk_bias: False
  topk_bias_update_rate: 0.001
  use_allgather_dispatcher: False

lr_schedule:
  type: CosineWithWarmUpLR
  learning_rate: 1.e-5
  lr_end: 0
  warmup_ratio: 0.03
  total_steps: -1

train_dataset: &train_dataset
  data_loader:
    type: MindDataset
    dataset_dir: "/data/alpaca.mindrecord"
    shuffle: True
  input_columns: ["input_ids", "labels"]
  num_parallel_workers: 8
  python_multiprocessing: False
  drop_remainder: True
  batch_size: 4
  repeat: 1
  numa_enable: False
  prefetch_size: 1
train_dataset_task:
  type: CausalLanguageModelDataset
  dataset_config: *train_dataset

eval_dataset: &eval_dataset
  <<: *train_dataset
  data_loader:
    type: MindDataset
    dataset_dir: ""
    shuffle: False
  drop_remainder: False
eval_dataset_task:
  type: CausalLanguageModelDataset
  dataset_config: *eval_dataset

use_parallel: True
parallel:
  parallel_mode: 1
  gradients_mean: False
  enable_alltoall: True
  full_batch: True
  search_mode: "sharding_propagation"
  enable_parallel_optimizer: True
  strategy_ckpt_save_file: "./ckpt_strategy.ckpt"
  parallel_optimizer_config:
    gradient_accumulation_shard: False
    parallel_optimizer_threshold: 64
parallel_config:
  data_parallel: &dp 8
  model_parallel: 1
  expert_parallel: *dp
  pipeline_stage: 2
  use_seq_parallel: False
  micro_batch_num: 16
  vocab_emb_dp: True
  gradient_aggregation_group: 4
micro_batch_interleave_num: 1

recompute_config:
  recompute: True
  select_recompute: False
  parallel_optimizer_comm_recompute: False
  mp_comm_recompute: True
  recompute_slice_activation: True

callbacks:
  - type: MFLossMonitor
  - type: CheckpointMointor
    prefix: "mixtral-8x7b"
    save_checkpoint_steps: 1000
    integrated_save: False
    async_save: False
  - type: ObsMonitor

context:
  jit_config:
    jit_level: "O2"
  mode: 0 #0--Graph Mode; 1--Pynative Mode
  device_target: "Ascend"
  enable_graph_kernel: False
  graph_kernel_flags: "--enable_parallel_fusion=true"
  max_call_depth: 10000
  max_device_memory: "58GB"
  memory_optimize_level: "O1"
  mempool_block_size: "59GB"
  save_graphs: False
  save_graphs_path: "./graph"
  device_id: 0
  ascend_config:
    precision_mode: "must_keep_origin_dtype"

model:
  model_config:
    type: LlamaConfig
    batch_size: 1
    seq_length: 4096
    hidden_size: 4096
    intermediate_size: 14336
    theta: 1000000
    num_layers: 32
    num_heads: 32
    vocab_size: 32000
    multiple_of: 256
    n_kv_heads: 8
    rms_norm_eps: 1.0e-5
    bos_token_id: 1
    eos_token_id: 2
    pad_token_id: 0
    ignore_token_id: -100
    compute_dtype: "float16"
    layernorm_compute_type: "float32"
    softmax_compute_type: "float16"
    rotary_dtype: "float16"
    param_init_type: "float16"
    use_past: False
    pretrain_seqlen: 4096
    extend_method: "None"
    compute_in_2d: False
    use_flash_attention: True
    offset: 0
    use_past_shard: False
    block_size: 16
    num_blocks: 512
    is_dynamic: True
    qkv_concat: False
    scaling_factor: 1.0
    checkpoint_name_or_path: ""
    repetition_penalty: 1
    max_decode_length: 512
    top_k: 3
    top_p: 1
    do_sample: False
  arch:
    type: LlamaForCausalLM

processor:
  return_tensors: ms
  tokenizer:
    unk_token: '<unk>'
    bos_token: '<s>'
    eos_token: '</s>'
    pad_token: '<unk>'
    type: LlamaTokenizer
    vocab_file: "/models/tokenizer.model"
  type: LlamaProcessor

metric:
  type: PerplexityMetric

runner_wrapper:
  type: MFTrainOneStepCell
  scale_sense:
    type: DynamicLossScaleUpdateCell
    loss_scale_value: 4294967296
    scale_factor: 2
    scale_window: 1000
  use_clip_grad: True

eval_callbacks:
  - type: ObsMonitor

auto_tune: False
filepath_prefix: './autotune'
autotune_per_step: 10

profile: False
profile_start_step: 5
profile_stop_step: 10
init_start_profile: False
profile_communication: False
profile_memory: True
layer_scale: False
layer_decay: 0.65
lr_scale_factor: 256

remote_save_url: "an address"
"""
