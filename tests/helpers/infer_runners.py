"""Every runner of the network, for tests that hold each of them to the same contract."""

from mixtral_ms.infer.runners.infer_weights import InferWeights
from mixtral_ms.infer.runners.select_runner import select_runner

RUNNERS = ("C++", "graph")
"""Names that `select_runner` takes as its backend."""


def build_runner(name, config, tensors, num_blocks=64, block_size=16):
    """A runner on float32 tensors."""
    weights = tensors
    if not isinstance(tensors, InferWeights):
        weights = InferWeights("float32", tensors, {})
    return select_runner(config, weights, num_blocks, block_size, backend=name)
