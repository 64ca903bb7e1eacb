"""Operators as cells: the plain reference, and those that call threaded or native ones."""
