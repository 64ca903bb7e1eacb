"""Mutated YAMLs: each is refused with an error that names the key; none gives a traceback.

The mutations are generated from valid files, always the same ones: a typo in every key, a wrong
type for every value, misspelt names, numbers that cannot be, files that are not there.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from mixtral_ms.config import load_config
from mixtral_ms.config.checks.check_config import check_config
from mixtral_ms.errors import UserError

ROOT = Path(__file__).parents[2]
FILES = {
    "tiny": ROOT / "research/mixtral_tiny/pretrain_mixtral-tiny.yaml",
    "predict": ROOT / "research/mixtral_8x7b/predict_mixtral-8x7b.yaml",
    "mindformers": ROOT / "tests/data/mindformers_style.yaml",
}
ALIASES = ("train_dataset_task.dataset_config", "eval_dataset_task.dataset_config")
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the C one is faster, where it is there
SMALL_WORDS = {"float32", "float16", "bfloat16"}


class Mutation(NamedTuple):
    """A valid file with one thing wrong, and the key the error must name."""

    file: str
    what: str
    data: dict
    named: str


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key path with its value, outer ones first."""
    items = enumerate(node) if isinstance(node, list) else node.items()
    for key, value in items:
        below = f"{path}.{key}" if path else str(key)
        yield below, value
        nested = isinstance(value, dict) or (isinstance(value, list) and below == "callbacks")
        if nested and below not in ALIASES:
            yield from walk(value, below)


def changed(data: dict, path: str, value: Any = None, *, rename: str | None = None) -> dict:
    """A copy with the value at `path` replaced, or its key renamed."""
    data = copy.deepcopy(data)
    node: Any = data
    *parents, last = path.split(".")
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    last = int(last) if isinstance(node, list) else last
    if rename is None:
        node[last] = value
    else:
        node[rename] = node.pop(last)
    return data


def typo(word: str, turn: int) -> str:
    """One of four slips of a finger, by turn."""
    middle = len(word) // 2
    return (
        word[:middle] + word[middle + 1 :],
        word[:middle] + word[middle] + word[middle:],
        word[:middle] + "x" + word[middle + 1 :],
        word + "_",
    )[turn % 4]


def wrong_type(value: Any, turn: int) -> Any:
    """A value of a type that the key of `value` cannot have."""
    if isinstance(value, bool):
        return ["True", 7][turn % 2]
    if isinstance(value, (int, float)):
        return ["many", [value], {"value": value}, "True"][turn % 4]
    if isinstance(value, str):
        return [[value, value], {"text": value}, [3]][turn % 3]
    return ["text", True][turn % 2]  # a section or a list


def key_typos(file: str, data: dict) -> Iterator[Mutation]:
    known = {path.split(".")[-1] for path, _ in walk(data)}
    for turn, (path, _) in enumerate(walk(data)):
        parent, _, key = path.rpartition(".")
        misspelt = typo(key, turn)
        if key.isdigit() or key == "type" or misspelt in known:
            continue
        named = f"{parent}.{misspelt}" if parent else misspelt
        yield Mutation(file, f"typo {named}", changed(data, path, rename=misspelt), named)


def wrong_types(file: str, data: dict) -> Iterator[Mutation]:
    for turn, (path, value) in enumerate(walk(data)):
        if value is None or path in ALIASES:
            continue
        wrong = wrong_type(value, turn)
        yield Mutation(file, f"{path}={wrong!r}", changed(data, path, wrong), path)


def misspelt_names(file: str, data: dict) -> Iterator[Mutation]:
    for turn, (path, value) in enumerate(walk(data)):
        if path.endswith("type") and isinstance(value, str) or value in list(SMALL_WORDS):
            wrong = typo(value, turn)
            yield Mutation(file, f"{path}={wrong}", changed(data, path, wrong), path)


IMPOSSIBLE = [
    *((f"runner_config.{key}", value) for key in ("epochs", "batch_size") for value in (0, -1)),
    ("runner_config.gradient_accumulation_steps", 0),
    ("runner_config.global_batch_size", 7),
    ("runner_config.max_steps", 0),
    ("runner_config.stop_at_step", -5),
    ("optimizer.betas", [0.9, 1.5]),
    ("optimizer.betas", [0.9, 0.95, 0.99]),
    ("optimizer.eps", 0.0),
    ("optimizer.eps", float("nan")),
    ("optimizer.weight_decay", -0.1),
    ("lr_schedule.learning_rate", -1e-3),
    ("lr_schedule.learning_rate", float("inf")),
    ("lr_schedule.warmup_ratio", 1.5),
    ("lr_schedule.warmup_steps", 100),
    ("lr_schedule.total_steps", 0),
    ("lr_schedule.lr_end", 5.0),
    ("runner_wrapper.max_grad_norm", 0.0),
    ("seed", -1),
    ("seed", 2**40),
    ("eval_step_interval", 0),
    ("eval_epoch_interval", -2),
    ("callbacks.1.keep_checkpoint_max", 0),
    ("callbacks.1.save_checkpoint_steps", -10),
    ("callbacks.1.prefix", "../x"),
    ("callbacks.0.per_print_times", 0),
    ("moe_config.expert_num", 0),
    ("moe_config.expert_num", 1),
    ("moe_config.num_experts_chosen", 0),
    ("moe_config.num_experts_chosen", 9),
    ("moe_config.capacity_factor", float("nan")),
    ("moe_config.capacity_factor", 1e6),
    ("moe_config.aux_loss_factor", -0.1),
    ("moe_config.router_jitter", 2.0),
    *(
        (f"model.model_config.{key}", value)
        for key in ("hidden_size", "num_layers", "num_heads", "seq_length", "vocab_size")
        for value in (0, -4)
    ),
    ("model.model_config.num_heads", 7),
    ("model.model_config.n_kv_heads", 3),
    ("model.model_config.n_kv_heads", 0),
    ("model.model_config.head_dim", 33),
    ("model.model_config.intermediate_size", 0),
    ("model.model_config.rms_norm_eps", -1e-5),
    ("model.model_config.theta", 0.0),
    ("model.model_config.sliding_window", 0),
    ("model.model_config.eos_token_id", 32000),
    ("model.model_config.pad_token_id", -2),
    ("model.model_config.max_position_embedding", 10),
    ("model.model_config.scaling_factor", 2.0),
    ("context.mode", 2),
    ("context.device_id", -1),
    ("context.max_device_memory", "lots"),
    ("parallel_config", {"model_parallel": 0}),
    ("train_dataset.input_columns", ["input_idz"]),
    ("train_dataset.data_loader.num_samples", 0),
    ("eval_dataset.batch_size", 0),
]
MISSING = [
    ("train_dataset.data_loader.dataset_dir", "/no/such.mindrecord"),
    ("train_dataset.data_loader.dataset_dir", ""),
    ("load_checkpoint", "/no/such/checkpoint"),
    ("src_strategy_path_or_dir", "/no/such/strategy"),
    ("output_dir", "/dev/null/run"),
]


def with_values(file: str, data: dict, table: list) -> Iterator[Mutation]:
    for path, value in table:
        named = path if not isinstance(value, dict) else f"{path}.{next(iter(value))}"
        yield Mutation(file, f"{path}={value!r}", changed(data, path, value), named)


def all_mutations() -> Iterator[Mutation]:
    for file, path in FILES.items():
        data = yaml.safe_load(path.read_text())
        yield from key_typos(file, data)
        yield from wrong_types(file, data)
        yield from misspelt_names(file, data)
        if file == "tiny":
            yield from with_values(file, data, IMPOSSIBLE + MISSING)


MUTATIONS = list(all_mutations())


def attempt(path: Path, mutation: Mutation) -> None:
    # paths are checked only where the mutation is about them: the originals name none that exist
    missing = mutation.named in {key for key, _ in MISSING}
    check_config(load_config(path), world_size=None, needs_paths=missing)


@pytest.mark.parametrize("file", FILES)
def test_the_files_themselves_are_fine(file):
    check_config(load_config(FILES[file]), world_size=None, needs_paths=False)


def test_there_are_more_than_a_hundred_of_each_main_kind():
    assert len(MUTATIONS) > 500
    assert sum(mutation.what.startswith("typo") for mutation in MUTATIONS) > 100
    assert len({(mutation.file, mutation.what) for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.what}"
)
def test_a_mutated_yaml_is_refused_by_name(mutation, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.dump(mutation.data, Dumper=DUMPER, sort_keys=False))
    with pytest.raises(UserError) as caught:
        attempt(path, mutation)
    # a contradiction between keys calls a network's key by its section's own name
    short = mutation.named.replace("model.model_config.", "model_config.")
    message = str(caught.value)
    assert mutation.named in message or short in message


@pytest.mark.parametrize("line", range(0, 120, 3))
def test_a_file_cut_or_broken_in_the_middle(line, tmp_path):
    """A stray bracket on any line: the error names the file and a line, or the key there."""
    lines = FILES["tiny"].read_text().splitlines()
    path = tmp_path / "run.yaml"
    path.write_text("\n".join([*lines[:line], "]broken: [", *lines[line:]]))
    with pytest.raises(UserError, match=r"run\.yaml:\d+: not valid YAML"):
        load_config(path)
