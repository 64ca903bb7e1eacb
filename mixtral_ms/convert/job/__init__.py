"""A conversion from its plan to its output."""
