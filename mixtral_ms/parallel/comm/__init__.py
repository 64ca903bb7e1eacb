"""Processes that meet, and what they send."""
