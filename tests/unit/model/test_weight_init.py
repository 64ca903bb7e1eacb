"""Initial weights: alike on every layout, drawn in parts, and not where a file follows."""

import zlib

import numpy as np
import pytest
from helpers.tiny import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor

from mixtral_ms.config import RunConfig
from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.graphs.pretended_device import PretendedAscend, replaced
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.model.nn import weight_init
from mixtral_ms.model.nn.weight_init import initial_part
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train import builders
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.gradients import GradientSums

EXPERT = "model.layers.3.feed_forward.routed_experts.ffn.w1.weight"
QUERY = "model.layers.0.attention.wq.weight"
ADAPTER = "model.layers.0.attention.wq.lora_a"


def whole(name, shape, std=0.5, seed=3):
    return initial_part(name, shape, tuple(slice(0, n) for n in shape), std, seed)


@st.composite
def regions(draw):
    shape = draw(st.sampled_from([(37, 8), (4, 21, 6), (1, 5, 30), (3, 16, 16)]))
    cuts = [sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for n in shape]
    return shape, tuple(slice(begin, end) for begin, end in cuts)


@given(
    st.sampled_from([EXPERT, QUERY, ADAPTER]),
    regions(),
    st.sampled_from([(4, 4), (5, 7), (64, 8), (1, 3)]),
    st.sampled_from([0, 240, 1 << 20]),
)
def test_a_part_is_what_the_whole_has_there(name, shape_and_region, tile, one_tile):
    shape, region = shape_and_region
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_init, "_TILE", tile)
        patch.setattr(weight_init, "_ONE_TILE", one_tile)
        part = initial_part(name, shape, region, 0.5, 3)
        np.testing.assert_array_equal(part, whole(name, shape)[region])


def test_a_part_draws_no_more_than_the_tiles_that_it_is_in(monkeypatch):
    """Of experts cut eight times over, as ranks of 8x7B have them: what they hold, and no more."""
    drawn, make = [], np.random.default_rng

    class Counted:
        def __init__(self, key):
            self.generator = make(key)

        def standard_normal(self, shape, dtype):
            drawn.append(np.prod(shape))
            return self.generator.standard_normal(shape, dtype=dtype)

    monkeypatch.setattr(np.random, "default_rng", Counted)
    for shape, cut in (((2, 14336, 512), 1), ((2, 512, 14336), 2)):
        drawn.clear()
        own = [slice(0, n) for n in shape]
        own[cut] = slice(3 * 1792, 4 * 1792)
        part = initial_part(EXPERT, shape, tuple(own), 0.5, 3)
        assert sum(drawn) == part.size


def test_a_small_tensor_is_one_draw():
    """So that it is what it was before large ones were drawn in tiles."""
    key = (3, zlib.crc32(EXPERT.encode()))
    expected = np.random.default_rng(key).standard_normal((4, 21, 6), np.float32)
    np.testing.assert_array_equal(whole(EXPERT, (4, 21, 6)), expected * np.float32(0.5))


def test_what_is_drawn(monkeypatch):
    monkeypatch.setattr(weight_init, "_ONE_TILE", 0)
    values = whole(EXPERT, (4, 700, 512))
    assert values.mean() == pytest.approx(0, abs=0.005)
    assert values.std() == pytest.approx(0.5, rel=0.01)
    # neither experts, tiles, parameters nor seeds repeat each other
    others = [values[1], whole(EXPERT, (4, 700, 512), seed=4)[0]]
    others.append(whole(EXPERT.replace("w1", "w3"), (4, 700, 512))[0])
    pairs = [(values[0], other) for other in others]
    pairs.append((values[0, :256, :256], values[0, :256, 256:]))
    pairs.append((values[0, :256, :256], values[0, 256:512, :256]))
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    assert (whole("model.norm_out.weight", (7,)) == 1).all()
    assert (whole("model.layers.0.attention.wq.bias", (7,)) == 0).all()


@pytest.fixture
def drawn(monkeypatch):
    """Names of the parameters that were drawn."""
    names = []

    def counted(name, *rest):
        names.append(name)
        return initial_part(name, *rest)

    monkeypatch.setattr(weight_init, "initial_part", counted)
    return names


def is_adapter(name):
    return name.endswith(("lora_a", "lora_b"))


@pytest.mark.parametrize("lora", [False, True])
def test_nothing_is_drawn_where_values_follow(device, drawn, monkeypatch, lora):
    pet = PetSection(lora_rank=2, target_modules=".*wq") if lora else None
    config = RunConfig()
    config.model.model_config = tiny_config(pet_config=pet)
    monkeypatch.setattr(builders, "open_network_weights", lambda _: type("", (), {"path": "file"}))
    monkeypatch.setattr(builders, "load_parameters", lambda *_, **__: None)

    def drawn_for(values):
        drawn.clear()
        network = builders.build_network(config, Mesh(), values=values)
        return set(drawn), {one.name for one in network.get_parameters() if one.name in drawn}

    everything, _ = drawn_for("initial")
    assert any(map(is_adapter, everything)) is lora
    assert not all(map(is_adapter, everything))
    config.load_checkpoint = "file"
    assert drawn_for("initial")[0] == {name for name in everything if is_adapter(name)}
    config.allow_partial = True
    assert drawn_for("initial")[0] == everything
    assert drawn_for("restored")[0] == drawn_for("none")[0] == set()


def test_an_accelerator_makes_its_zeros_itself(graph):
    """Weights before a file's values, moments, gradient sums: no array of the host behind them."""

    def refused(*_):
        raise AssertionError("an array of the host")

    with (
        PretendedAscend(0).in_place(),
        replaced(Tensor, "from_numpy", staticmethod(refused)),
        replaced(Tensor, "asnumpy", refused),
    ):
        network = MixtralForCausalLM(tiny_config(), seed=None)
        optimizer = AdamW(network.trainable_params())
        sums = GradientSums(tuple(network.trainable_params()), {})
    made = [*network.trainable_params(), *optimizer._first, *optimizer._second, *sums.values]
    assert all((one.asnumpy() == 0).all() for one in made)
