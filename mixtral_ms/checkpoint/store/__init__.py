"""Folders of checkpoints, with a hash for every tensor."""
