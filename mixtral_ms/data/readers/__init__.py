"""Text and rows from files."""
