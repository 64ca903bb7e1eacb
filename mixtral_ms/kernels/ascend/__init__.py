"""Ascend kernels, written from MindSpore's documented interfaces.

No Ascend device runs in CI: these cells are checked only where somebody has one, by
`pytest tests/unit/kernels/test_kernels.py --device Ascend`, which holds them to the same contract.
"""
