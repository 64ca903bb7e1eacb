"""What runs the network for the engine."""
