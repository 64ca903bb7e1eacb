"""Checkpoints: file formats, folders that are whole or absent, parts of ranks, resharding."""
