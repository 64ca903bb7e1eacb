"""One step: gradients, update, learning rate."""
