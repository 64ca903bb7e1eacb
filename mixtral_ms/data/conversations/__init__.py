"""Conversations to records for fine-tuning."""
