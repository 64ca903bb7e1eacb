"""What both sides of the tests with MindFormers agree on; imports nothing of either."""

SEQ_LENGTH, VOCAB, ROWS = 64, 320, 4
"""ROWS: of a batch."""
TRAIN_ROWS, EVAL_ROWS = 16, ROWS
PROMPT = "the import statement"
NEW_TOKENS = 12
NETWORK = {
    "seq_length": SEQ_LENGTH,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": VOCAB,
    "compute_dtype": "float32",
    "init_method_std": 0.1,
}
MOE = {
    "expert_num": 8,
    "num_experts_chosen": 2,
    "capacity_factor": 1.1,
    "aux_loss_factor": 0.05,
    "routing_policy": "TopkRouterV2",
    "enable_sdrop": True,
}
RATE = {"learning_rate": 5e-3, "lr_end": 1e-4}
"""Of a cosine without warm-up."""
