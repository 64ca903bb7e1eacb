"""Operators behind one seam (select.py): a plain reference, and one implementation a backend."""
