"""Ranks, their groups, and where each tensor lies on them."""
