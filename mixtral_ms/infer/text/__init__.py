"""Prompts, templates and pieces of text."""
