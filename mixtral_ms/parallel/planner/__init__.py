"""Memory, traffic and time of a layout, and the search over layouts."""
