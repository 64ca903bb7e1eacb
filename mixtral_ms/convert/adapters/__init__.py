"""LoRA adapters merged into weights, and in PEFT's format."""
