"""Small checkpoints for tests of resharding."""

import hashlib

import numpy as np

from helpers.tiny import tiny_config
from mixtral_ms.checkpoint.formats.mindspore_ckpt_format import write_ckpt
from mixtral_ms.checkpoint.formats.open_file import open_tensors
from mixtral_ms.checkpoint.formats.safetensors_format import write_safetensors
from mixtral_ms.checkpoint.formats.tensor_source import outgoing
from mixtral_ms.parallel.grid.sharding_rules import (
    MOMENTS,
    local_shape,
    parameter_shapes,
    stages_of,
)


def network(**changes):
    """Divides by 8 ranks in every way."""
    return tiny_config(**{"vocab_size": 64, **changes})


def local_parameter_shapes(config, grid, stage):
    """Shapes of the parameters (or their parts) on a rank of pipeline stage `stage`."""
    return {
        name: local_shape(name, shape, grid)
        for name, shape in parameter_shapes(config).items()
        if stage in stages_of(name, config, grid.pipeline_stage)
    }


def whole_tensors(dtype="float32", moments=True, config=None):
    """name -> (array, dtype) of a whole network, moments in float32, and a counter."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in parameter_shapes(config or network()).items():
        values = rng.standard_normal(shape).astype(np.float32)
        if dtype == "bfloat16":
            tensors[name] = ((values.view(np.uint32) >> 16).astype(np.uint16), dtype)
        else:
            tensors[name] = (values.astype(dtype), dtype)
        for prefix in MOMENTS if moments else ():
            tensors[prefix + name] = (rng.standard_normal(shape).astype(np.float32), "float32")
    tensors["global_step"] = (np.array([7], np.int32), "int32")
    return tensors


def write_tensors(path, tensors):
    """Write a .ckpt or .safetensors file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [outgoing(name, array, dtype) for name, (array, dtype) in tensors.items()]
    if path.suffix == ".ckpt":
        write_ckpt(path, listed)
    else:
        write_safetensors(path, listed, {"format": "ms"})
    return path


def write_whole(path, dtype="float32", **options):
    """A whole network in one file; returns its path."""
    return write_tensors(path, whole_tensors(dtype, **options))


def contents(path):
    """name -> (shape, dtype, bytes) of a file."""
    source = open_tensors(path)
    return {
        name: (info.shape, info.dtype, source.read(name).tobytes())
        for name, info in source.infos.items()
    }


def folder_hashes(folder):
    """Every file of a folder with its hash: what must not change."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
