"""MindRecord files."""
