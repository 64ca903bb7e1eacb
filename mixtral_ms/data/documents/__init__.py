"""Documents to records for pretraining."""
