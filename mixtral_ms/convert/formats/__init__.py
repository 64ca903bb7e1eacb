"""Names and layouts of weights in every format."""
