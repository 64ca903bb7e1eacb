"""Contradictions that are found before anything is built."""
