"""Checkpoints cut for other rank grids, and merged."""
