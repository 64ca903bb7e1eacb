"""LoRA adapters on disk, the weights they were made for, and both seen as one."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_ms.checkpoint.formats.dtype_casts import cast
from mixtral_ms.checkpoint.formats.regions import whole_region
from mixtral_ms.checkpoint.formats.tensor_source import Region, TensorInfo, TensorSource
from mixtral_ms.checkpoint.reshard.open_checkpoint import open_source
from mixtral_ms.checkpoint.store.manifest import STATE
from mixtral_ms.checkpoint.store.store import resolve_checkpoint
from mixtral_ms.config.checks.saved_network import saved_network
from mixtral_ms.config.derived.numerics import warn_of_other_numerics
from mixtral_ms.config.derived.parameter_row import LORA_A, LORA_B, is_lora_name
from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.convert.adapters.peft_export import CONFIG_FILE
from mixtral_ms.convert.adapters.peft_import import described_base, open_peft
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.grid.sharding_rules import adapter_shapes, parameter_of

ADAPTER_KEY = "adapter"
_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class Adapter:
    """An adapter that was opened.

    Attributes:
        path: its folder.
        network: that it was trained in.
        pet: rank, scale and target modules.
        tensors: A and B under our names.
        base: what it was made for, see `base_record`; None where nothing says so.
    """

    path: Path
    network: MixtralConfig
    pet: PetSection
    tensors: TensorSource
    base: Mapping[str, Any] | None


def open_adapter(path: Path, config: MixtralConfig, flag: str = ADAPTER_KEY) -> Adapter:
    """An adapter for a network: a LoRA run's checkpoint, or the latest of several; or PEFT's.

    Raises:
        UserError: there is none, it is damaged, or it does not fit the network.
    """
    if not path.is_dir():
        raise UserError(f"{flag}: the folder {path} does not exist")
    of_peft = (path / CONFIG_FILE).is_file()
    adapter = _open_peft(path, config, flag) if of_peft else _open_checkpoint(path, flag)
    expected = adapter_shapes(_with_adapters(config, adapter.pet))
    _require_shapes(adapter, expected, flag)
    warn_of_other_numerics(adapter.path / STATE, adapter.network, config)
    return adapter


def _open_peft(path: Path, config: MixtralConfig, flag: str) -> Adapter:
    pet, tensors = open_peft(path, config.num_layers, flag)
    return Adapter(path, _with_adapters(config, pet), pet, tensors, None)


def _open_checkpoint(path: Path, flag: str) -> Adapter:
    opened = open_source(resolve_checkpoint(path), verify=False)
    tensors = _AdapterTensors(opened.tensors)
    if not tensors.infos:
        raise UserError(f"{flag}: {opened.folder} holds whole weights, and no adapter")
    state = opened.folder / STATE
    network = saved_network(opened.state, state)
    if network is None or network.pet_config is None or "base" not in opened.state:
        raise UserError(f"{flag}: {state} does not say rank, alpha and weights of an adapter")
    return Adapter(opened.folder, network, network.pet_config, tensors, opened.state["base"])


class _AdapterTensors(TensorSource):
    """A and B alone of a checkpoint with optimizer state."""

    def __init__(self, source: TensorSource) -> None:
        self.path, self._source = source.path, source
        self.infos = {
            name: info
            for name, info in source.infos.items()
            if is_lora_name(name) and parameter_of(name) == name
        }

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """See TensorSource."""
        return self._source.read(name, region)


def _with_adapters(config: MixtralConfig, pet: PetSection) -> MixtralConfig:
    return dataclasses.replace(config, pet_config=pet)


def _require_shapes(adapter: Adapter, expected: Mapping[str, tuple], flag: str) -> None:
    found = {name: info.shape for name, info in adapter.tensors.infos.items()}
    problems = [
        f"{name}: {found.get(name, 'missing')} in the adapter, {expected.get(name, 'none')} needed"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    if problems:
        shown = "\n  ".join(problems[:_PROBLEMS_SHOWN])
        raise UserError(
            f"{flag}: {adapter.path} does not fit model.model_config, {len(problems)} tensors "
            f"differ:\n  {shown}"
        )


def base_record(path: str, fingerprint: str) -> dict[str, str]:
    """What an adapter's state says of the weights that it is for."""
    return {"path": path, "fingerprint": fingerprint}


def require_base(base: Mapping[str, Any], fingerprint: str, adapter: Path, given: str) -> None:
    """Refuse other weights than those an adapter was made for.

    Raises:
        UserError: they are others; both are named.
    """
    if base["fingerprint"] != fingerprint:
        raise UserError(
            f"the adapter {adapter} was made for the weights of {base['path']} (fingerprint "
            f"{base['fingerprint']}), and those of {given} are others ({fingerprint}): give "
            "--load_checkpoint the weights that it was made for"
        )


def require_continued(adapter: Adapter, pet: PetSection, fingerprint: str, given: str) -> None:
    """Refuse to train an adapter on where it would begin as something else than it was.

    Args:
        adapter: that is trained on.
        pet: rank and scale of the run.
        fingerprint: of the weights beneath it.
        given: where these are from.

    Raises:
        UserError: another scale, or other weights, than those that it was trained with.
    """
    if adapter.pet.scale != pet.scale:
        was, now = adapter.pet, pet
        raise UserError(
            f"{ADAPTER_KEY}: {adapter.path} was trained with lora_alpha {was.lora_alpha:g} (scale "
            f"{was.scale:g}), model_config.pet_config.lora_alpha is {now.lora_alpha:g} (scale "
            f"{now.scale:g}): what it adds to the weights would change at once. Set lora_alpha "
            f"{was.lora_alpha:g}"
        )
    _require_own_base(adapter, fingerprint, given)


def _require_own_base(adapter: Adapter, fingerprint: str, given: str) -> None:
    if adapter.base is not None:
        require_base(adapter.base, fingerprint, adapter.path, given)
        return
    get_logger().warning(
        "%s is for the weights %r, as PEFT says: nothing shows whether those of %s are they",
        adapter.path,
        described_base(adapter.path),
        given,
    )


def fingerprint_of(source: TensorSource) -> str:
    """Hash of a sample of all weights, in float32: the same in every format that is as exact."""

    def tensors() -> Iterable[tuple[str, tuple[int, ...], Callable[[Region], np.ndarray]]]:
        for name, info in source.infos.items():

            def read(region: Region, name: str = name, info: TensorInfo = info) -> np.ndarray:
                return cast(source.read(name, region), info.dtype, "float32")

            yield name, info.shape, read

    return fingerprint(tensors())


def fingerprint(
    tensors: Iterable[tuple[str, tuple[int, ...], Callable[[Region], np.ndarray]]],
) -> str:
    """As `fingerprint_of`, of names, shapes and ways to read a region in float32.

    The sample is the middle row of every matrix, of every expert's too, and the whole of vectors:
    training changes them all.
    """
    lines = []
    for name, shape, read in tensors:
        digest = hashlib.sha256(repr((name, tuple(shape))).encode())
        region = whole_region(shape)
        if len(shape) > 1:
            middle = shape[-2] // 2
            region = (*region[:-2], slice(middle, middle + 1), region[-1])
        digest.update(np.ascontiguousarray(read(region)).tobytes())
        lines.append(digest.hexdigest())
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:16]


class AdaptedWeights(TensorSource):
    """Weights under our names with an adapter added: W + scale * B A, in float32.

    Args:
        weights: of the network.
        adapter: for it.
    """

    def __init__(self, weights: TensorSource, adapter: Adapter) -> None:
        self.path, self.adapter, self._weights = weights.path, adapter, weights
        self.infos = {
            name: TensorInfo(info.shape, "float32") if self._is_adapted(name) else info
            for name, info in weights.infos.items()
        }

    @property
    def stored_dtype(self) -> str:
        """The dtype of the weights, float32 where they have several."""
        dtypes = {info.dtype for info in self._weights.infos.values()}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """See TensorSource."""
        values = self._weights.read(name, region)
        if not self._is_adapted(name):
            return values
        info, module = self._weights.infos[name], name.removesuffix(".weight")
        *experts, rows, columns = region or whole_region(info.shape)
        low = self._read(module + LORA_A, (*experts, slice(None), columns))
        high = self._read(module + LORA_B, (*experts, rows, slice(None)))
        delta = np.float32(self.adapter.pet.scale) * (high @ low)
        return cast(values, info.dtype, "float32") + delta

    def _is_adapted(self, name: str) -> bool:
        return name.removesuffix(".weight") + LORA_A in self.adapter.tensors.infos

    def _read(self, name: str, region: Region) -> np.ndarray:
        tensors = self.adapter.tensors
        info = tensors.infos[name]
        cuts = [one.indices(size) for one, size in zip(region, info.shape, strict=True)]
        values = tensors.read(name, tuple(slice(start, stop) for start, stop, _ in cuts))
        return cast(values, info.dtype, "float32")


def adapted(
    weights: TensorSource, path: Path, config: MixtralConfig, flag: str = ADAPTER_KEY
) -> AdaptedWeights:
    """Weights with the adapter at `path` added.

    Raises:
        UserError: there is none, it is damaged, does not fit, or was made for other weights.
    """
    adapter = open_adapter(path, config, flag)
    if adapter.base is None:
        _require_own_base(adapter, "", str(weights.path))
    else:
        require_base(adapter.base, fingerprint_of(weights), adapter.path, str(weights.path))
    get_logger().info("adapter from %s", adapter.path)
    return AdaptedWeights(weights, adapter)
