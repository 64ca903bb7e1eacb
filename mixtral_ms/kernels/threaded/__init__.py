"""The CPU's operators in numpy, on threads."""
