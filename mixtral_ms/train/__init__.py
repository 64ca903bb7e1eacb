"""Training: the Trainer, its step, its state and its report."""
