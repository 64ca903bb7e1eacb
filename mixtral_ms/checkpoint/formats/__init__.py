"""File formats of tensors, read through maps and written as streams."""
