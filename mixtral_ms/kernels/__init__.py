"""Operators behind one seam: a plain reference, and one implementation a backend."""

from mixtral_ms.kernels.select import KernelChoice, select_kernels

__all__ = ["KernelChoice", "select_kernels"]
