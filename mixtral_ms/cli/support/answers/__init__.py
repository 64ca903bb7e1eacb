"""Predict mode, and the file that its answers go to."""
