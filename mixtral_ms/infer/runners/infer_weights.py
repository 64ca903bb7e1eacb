"""Weights as a runner wants them: float32, float16, or int8 with a scale per output row.

Legend: D hidden, F intermediate, E experts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mixtral_ms.checkpoint.formats.dtype_casts import cast
from mixtral_ms.checkpoint.formats.regions import Region
from mixtral_ms.checkpoint.formats.tensor_source import TensorSource
from mixtral_ms.checkpoint.shards.part_source import PartSource
from mixtral_ms.config.derived.parameter_row import ParameterRow
from mixtral_ms.config.derived.parameter_table import bias_of
from mixtral_ms.config.derived.prediction import prediction_grid, stored_dtype
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.parallel.grid.sharding_rules import parameter_shapes, placement_on_stage

WeightDtype = Literal["float32", "float16", "int8"]
WEIGHT_DTYPES: tuple[WeightDtype, ...] = get_args(WeightDtype)

_PIECE_BYTES = 64 << 20
_FLOATS = ("float32", "float16", "bfloat16")
_MOST_NAMED = 8


@dataclass(frozen=True)
class InferWeights:
    """Every tensor of the network under its parameter's name.

    Weights of linear layers are (out, in), of experts w1 and w3 (E, F, D), w2 (E, D, F).
    Embedding, norms, biases and router are float32 whatever the dtype.
    """

    dtype: WeightDtype
    tensors: dict[str, np.ndarray]
    """Row-major; float32, float16 or int8. May be read-only views of a mapped file."""
    scales: dict[str, np.ndarray]
    """float32, one per output row, (out,) or (E, out), of int8 tensors only:
    weight = tensor * scale[..., None]."""

    def of(
        self, row: ParameterRow, layer: int = 0
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """A parameter's tensor, scales and the bias of its product."""
        name, bias = row.at(layer), bias_of(row)
        bias_tensor = None if bias is None else self.tensors.get(bias.at(layer))
        return self.tensors[name], self.scales.get(name), bias_tensor


def load_weights(
    source: TensorSource,
    config: MixtralConfig,
    weight_dtype: WeightDtype = "float32",
    mesh: Mesh | None = None,
) -> InferWeights:
    """The network's tensors, or a rank's parts of them, from a source that has our names.

    What already has the wanted dtype stays a view of the file; anything else is cast piece by
    piece, so that no more than 64 MB exist twice.

    Raises:
        UserError: tensors are missing, surplus, misshapen or no floats; values are not finite, or
            become so in float16.
        DamagedFileError: the source cannot be read.
    """
    if weight_dtype not in WEIGHT_DTYPES:
        raise UserError(f"weight_dtype {weight_dtype!r}: allowed are {', '.join(WEIGHT_DTYPES)}")
    shapes = parameter_shapes(config)
    _check_tensors(source, shapes)
    if mesh is not None and mesh.world_size > 1:
        source = PartSource(source, _regions(shapes, mesh))
        shapes = {name: source.infos[name].shape for name in shapes}
    tensors: dict[str, np.ndarray] = {}
    scales: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for name, shape in shapes.items():
        wanted = stored_dtype(name, weight_dtype)
        bad = 0
        if source.infos[name].dtype == wanted:
            # A view of a file is copied only where its values do not lie at whole addresses.
            tensors[name] = np.require(source.read(name), requirements=("C", "A"))
            bad = sum(_not_finite(tensors[name][rows]) for rows in _pieces(shape))
        else:
            tensors[name] = np.empty(shape, wanted)
            if wanted == "int8":
                scales[name] = np.empty(shape[:-1], np.float32)
            for rows in _pieces(shape):
                values = _as_float32(source, name, rows)
                own = scales[name][rows] if name in scales else None
                bad += _store(values, tensors[name][rows], own)
        if bad:
            problems.append(f"{name} ({bad} of {tensors[name].size} values)")
    if problems:
        advice = "; give --weight_dtype float32" if weight_dtype == "float16" else ""
        raise UserError(
            f"{source.path}: NaN or infinity as {weight_dtype} in {_listed(problems)}{advice}"
        )
    return InferWeights(weight_dtype, tensors, scales)


def empty_weights(config: MixtralConfig, weight_dtype: WeightDtype, mesh: Mesh) -> InferWeights:
    """Zeros in place of what `load_weights` gives."""
    grid = prediction_grid(mesh.grid)
    shapes = {
        name: placement_on_stage(name, len(shape), grid).local_shape(shape)
        for name, shape in parameter_shapes(config).items()
    }
    dtypes = {name: stored_dtype(name, weight_dtype) for name in shapes}
    scaled = [name for name, dtype in dtypes.items() if dtype == "int8"]
    return InferWeights(
        weight_dtype,
        {name: np.zeros(shape, dtypes[name]) for name, shape in shapes.items()},
        {name: np.zeros(shapes[name][:-1], np.float32) for name in scaled},
    )


def _regions(shapes: Mapping[str, tuple[int, ...]], mesh: Mesh) -> dict[str, Region]:
    grid = prediction_grid(mesh.grid)
    return {
        name: placement_on_stage(name, len(shape), grid).region(shape, mesh.rank)
        for name, shape in shapes.items()
    }


def _check_tensors(source: TensorSource, shapes: dict[str, tuple[int, ...]]) -> None:
    infos = source.infos
    problems = []
    if missing := [name for name in shapes if name not in infos]:
        problems.append(f"{len(missing)} tensors are missing: {_listed(missing)}")
    if surplus := [name for name in infos if name not in shapes]:
        problems.append(f"{len(surplus)} tensors are not of this network: {_listed(surplus)}")
    common = [name for name in shapes if name in infos]
    if misshapen := [
        f"{name} {list(infos[name].shape)} instead of {list(shapes[name])}"
        for name in common
        if tuple(infos[name].shape) != shapes[name]
    ]:
        problems.append(f"{len(misshapen)} tensors have another shape: {_listed(misshapen)}")
    if whole := [
        f"{name} {infos[name].dtype}" for name in common if infos[name].dtype not in _FLOATS
    ]:
        problems.append(f"{len(whole)} tensors are not of {', '.join(_FLOATS)}: {_listed(whole)}")
    if problems:
        raise UserError(
            f"{source.path} does not fit the network of the configuration: {'; '.join(problems)}. "
            "Give the checkpoint of this model, or the configuration of this checkpoint"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Ranges of the first axis of about _PIECE_BYTES in float32."""
    row = 4 * int(np.prod(shape[1:]))
    step = max(1, _PIECE_BYTES // max(row, 1))
    for begin in range(0, shape[0], step):
        yield slice(begin, min(begin + step, shape[0]))


def _as_float32(source: TensorSource, name: str, rows: slice) -> np.ndarray:
    info = source.infos[name]
    region = (rows, *(slice(0, size) for size in info.shape[1:]))
    return cast(source.read(name, region), info.dtype, "float32")


def _store(values: np.ndarray, tensor: np.ndarray, scales: np.ndarray | None) -> int:
    """Cast into `tensor`, int8 where it has scales; returns how many values are not finite then."""
    if scales is None:
        with np.errstate(over="ignore"):
            tensor[...] = values
        return _not_finite(tensor)
    bad = _not_finite(values)
    peaks = np.abs(values).max(-1)
    scales[...] = np.where(peaks > 0, peaks / 127, 1)
    if not bad:
        np.rint(values / scales[..., None], out=tensor, casting="unsafe")
    return bad


def _not_finite(values: np.ndarray) -> int:
    # A sum of squares tells in one fast pass; only what it suspects is counted value by value.
    flat = values.reshape(-1)
    if flat.dtype == np.float32 and np.isfinite(np.dot(flat, flat)):
        return 0
    return int(flat.size - np.count_nonzero(np.isfinite(flat)))
