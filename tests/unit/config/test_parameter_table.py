"""The table of parameters is the only one: a row is enough, and nobody else spells names."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.convert_oracle import HIDDEN, LAYERS, WIDTH, tensors_in, write_source
from helpers.numpy_runner import random_tensors
from helpers.sharded import local_parameter_shapes
from helpers.tiny import tiny_config
from safetensors.numpy import load_file, save_file

import mixtral_ms
from mixtral_ms.config.derived import parameter_table as table
from mixtral_ms.config.derived.parameter_row import Lora, ParameterRow, Stored, adapter_rows
from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.convert.formats.weight_names import FORMATS
from mixtral_ms.convert.job.conversion import ConvertOptions, convert, prepare
from mixtral_ms.errors import UserError
from mixtral_ms.infer.runners.base import RunnerUnavailableError
from mixtral_ms.infer.runners.cpp import decoder_library
from mixtral_ms.infer.runners.cpp_runner import CppRunner
from mixtral_ms.infer.runners.infer_weights import InferWeights
from mixtral_ms.model.nn.weight_init import initial_part
from mixtral_ms.parallel.grid import sharding_rules as layout

PACKAGE = Path(mixtral_ms.__file__).parent
TABLE = "config/derived/parameter_table.py"
MAY_SAY = {
    "model/mixtral.py": {"embedding_weight"},  # the cell that has it
    "convert/formats/weight_names.py": {"routed_experts", "gate_up_proj"},  # in what users are told
    "train/report/flops.py": {"lm_head"},  # the part of a step's FLOPs
    "parallel/planner/time_model.py": {"lm_head"},
}
SHARED = ParameterRow(
    "model.layers.{layer}.shared_expert.w1.weight",
    (table.INTERMEDIATE, table.HIDDEN),
    initial="ones",
    always_float32=True,
    lora=Lora("module"),
    elsewhere={"hf": Stored("model.layers.{layer}.shared.up.weight")},
)
NAME, THEIRS = SHARED.at(1), "model.layers.1.shared.up.weight"


@pytest.fixture
def with_shared(monkeypatch):
    """The table with one more row, and nothing else changed."""
    rows = list(table.PARAMETERS)
    rows.insert(rows.index(table.FINAL_NORM), SHARED)
    monkeypatch.setattr(table, "PARAMETERS", tuple(rows))


# a row is enough


def test_a_row_is_laid_out(with_shared):
    config = tiny_config(vocab_size=62)
    assert layout.parameter_shapes(config)[NAME] == (40, 24)
    grid = ParallelConfig(data_parallel=2, model_parallel=2, pipeline_stage=2)
    assert local_parameter_shapes(config, grid, 1)[NAME] == (20, 24)
    assert NAME not in local_parameter_shapes(config, grid, 0)
    placed = layout.placements(config, grid, [NAME, "adam_m." + NAME], zero=True)
    assert placed[NAME][1].cuts == (2, 1)
    assert placed["adam_m." + NAME][1].shards == 2


def test_a_row_is_adapted_and_filled(with_shared):
    config = tiny_config(pet_config=PetSection(lora_rank=3, target_modules=r".*shared_expert\.w1"))
    module = NAME.removesuffix(".weight")
    shapes = layout.adapter_shapes(config)
    assert shapes[module + ".lora_a"] == (3, 24)
    assert shapes[module + ".lora_b"] == (40, 3)
    grid = ParallelConfig(model_parallel=2)
    assert layout.local_shape(module + ".lora_a", (3, 24), grid) == (3, 24)
    assert layout.local_shape(module + ".lora_b", (40, 3), grid) == (20, 3)
    part = initial_part(NAME, (2, 2), (slice(0, 2), slice(1, 2)), 0.02, 0)
    np.testing.assert_array_equal(part, np.ones((2, 1)))


def test_a_row_is_converted(tmp_path, with_shared):
    write_source(tmp_path / "in", "hf")
    file = tmp_path / "in" / "model.safetensors"
    shared = {
        SHARED.elsewhere["hf"].name.format(layer=layer): np.full((WIDTH, HIDDEN), layer, np.float32)
        for layer in range(LAYERS)
    }
    save_file(load_file(file) | shared, file)
    convert(prepare(ConvertOptions(tmp_path / "in", tmp_path / "ours", "ours")))
    np.testing.assert_array_equal(tensors_in(tmp_path / "ours")[NAME], shared[THEIRS])
    convert(prepare(ConvertOptions(tmp_path / "ours", tmp_path / "back", "hf")))
    np.testing.assert_array_equal(tensors_in(tmp_path / "back")[THEIRS], shared[THEIRS])


def test_a_format_without_its_name_refuses_the_network(tmp_path, with_shared):
    write_source(tmp_path / "in", "native")
    with pytest.raises(UserError, match=r"native .* has no place for .*shared_expert.* and 1 more"):
        prepare(ConvertOptions(tmp_path / "in", tmp_path / "out", "ours"))


def test_the_cpp_decoder_refuses_what_it_has_no_field_for(with_shared):
    config = tiny_config()
    weights = InferWeights("float32", random_tensors(config), {})
    if decoder_library.build() is None:
        pytest.skip("the C++ decoder cannot be built")
    with pytest.raises(RunnerUnavailableError, match=r"knows no .*shared_expert"):
        CppRunner(config, weights, 4, 4)


# the rows


def test_adapters_are_cut_as_their_matrix_is():
    def cuts(row):
        return [(one.tensor_axis, one.expert_axis) for one in adapter_rows(row)]

    assert cuts(table.QUERY) == [(None, None), (0, None)]
    assert cuts(table.OUTPUT) == [(1, None), (None, None)]
    assert cuts(table.ROUTER) == [(None, None), (None, None)]
    assert cuts(table.EXPERT_GATE) == [(None, 0), (1, 0)]
    assert cuts(table.EXPERT_DOWN) == [(2, 0), (None, 0)]


@pytest.mark.parametrize("row", table.PARAMETERS, ids=lambda row: row.name)
def test_a_row_agrees_with_itself(row):
    assert (row.stage == "layer") == ("{layer}" in row.name)
    assert row.elsewhere.keys() <= FORMATS.keys()
    for stored in row.elsewhere.values():
        assert ("{layer}" in stored.name) == (row.stage == "layer")
        assert "{expert}" not in stored.name or row.expert_axis is not None
        assert not stored.flat or row.expert_axis is not None
    assert row.decoder


@pytest.mark.parametrize("format_", FORMATS.values(), ids=lambda one: one.name)
def test_a_format_holds_every_parameter_of_mixtral(format_):
    """Biases apart, which only our own formats have."""
    held = [row for entry in format_.entries for row in entry.rows]
    biases = [row for row in table.PARAMETERS if row.name.endswith(".bias")]
    assert set(held) | set(biases) == set(table.PARAMETERS)
    assert len(held) == len(set(held))
    for entry in format_.entries:
        assert len({row.axes for row in entry.rows}) == 1


def test_names_are_found_and_others_are_not():
    assert table.row_of("model.layers.31.attention.wq.weight") is table.QUERY
    assert table.row_of("model.layers.7.attention.wq.lora_b").initial == "zeros"
    assert table.layer_of("model.layers.31.attention.wq.weight") == 31
    assert table.layer_of(table.EMBEDDING.name) is None
    for name in (
        "model.layers.0.attention.wz.weight",
        "model.layers.{layer}.attention.wq.bias.weight",
        "model.layers.0.attention_norm.lora_a",
        "adam_m.model.layers.0.attention.wq.weight",
    ):
        with pytest.raises(UserError, match=re.escape(name)):
            table.row_of(name)


# the C++ decoder


@pytest.mark.parametrize("kind", ["Layer", "Model"])
def test_structures_have_the_fields_of_the_header_in_its_order(kind):
    """Sizes alone, which the library compares, do not show two fields that were swapped."""
    header = (PACKAGE / "infer/runners/cpp/decoder.hpp").read_text(encoding="utf-8")
    body = re.search(rf"struct {kind} {{\n(.*?)\n}};", header, re.DOTALL)[1]
    lines = [
        line.partition("//")[0].strip()
        for line in body.splitlines()
        if "(" not in line.partition("//")[0]
    ]
    declared = re.findall(r"(?:const )?(\w+)([* ]+)([\w, *]+);", "\n".join(lines))
    fields = [
        (name.strip(" *"), type_ == "Matrix")
        for type_, _, names in declared
        for name in names.split(",")
    ]
    structure = getattr(decoder_library, kind)
    assert fields == [(name, one is decoder_library.Matrix) for name, one in structure._fields_]


# names


def spelled():
    """Words that stand for a parameter in some format: all parts that have an underscore."""
    stored = [one.name for row in table.PARAMETERS for one in row.elsewhere.values()]
    names = [row.name for row in table.PARAMETERS] + stored
    parts = {part for name in names for part in name.split(".")}
    pairs = {
        match
        for name in names
        for match in re.findall(r"(?:attention|dense|router|ffn)\.\w+", name)
    }
    return {part for part in parts if "_" in part} | pairs


def literals(source):
    """Every string of a module that is no docstring."""
    tree = ast.parse(source)
    described = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in described:
            yield node.value


def words_spelled(source, words):
    texts = list(literals(source))
    return {word for word in words if any(re.search(rf"\b{re.escape(word)}\b", t) for t in texts)}


@pytest.mark.parametrize(
    "module", [str(path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py"))]
)
def test_only_the_table_spells_names_of_parameters(module):
    found = words_spelled((PACKAGE / module).read_text(encoding="utf-8"), spelled())
    if module == TABLE:
        assert found == spelled()
    else:
        assert found == MAY_SAY.get(module, set())


def test_a_spelled_name_is_seen():
    words = spelled()
    assert {"tok_embeddings", "block_sparse_moe", "routed_experts", "attention.wq"} <= words
    assert words_spelled('x = f"{prefix}attention.wq.weight"', words) == {"attention.wq"}
    assert words_spelled('x = "model.layers.0.block_sparse_moe.w1"', words) == {"block_sparse_moe"}
    assert words_spelled('"""Of attention.wq."""\nx = "attention"', words) == set()
