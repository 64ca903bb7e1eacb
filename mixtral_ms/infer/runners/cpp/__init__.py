"""The network in C++, called with numpy arrays."""
