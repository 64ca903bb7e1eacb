"""Metrics of a run and what people see of them."""
