"""The network: Mixtral with explicit tensors, router and experts."""
