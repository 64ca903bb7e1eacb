"""The network's configuration as other systems write it, config.json and params.json; and ours.

Read as transformers reads it, except that nothing is guessed: two spellings of one fact that differ
are an error, as is a fact that decides over the numbers and is not there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_ms.checkpoint.store.conversion_record import FORMAT_KEY, OTHERS_KEY
from mixtral_ms.checkpoint.store.manifest import STATE
from mixtral_ms.config import load_config
from mixtral_ms.config.checks.check_model import network_problems
from mixtral_ms.config.checks.saved_network import NETWORK_KEY, saved_network
from mixtral_ms.config.sections.model_section import NO_TOKEN, MixtralConfig, MoEConfig
from mixtral_ms.convert.formats.detect_format import Measured
from mixtral_ms.errors import UserError
from mixtral_ms.json_reader import read_json_object, require_shape

CONFIG_JSON, PARAMS_JSON, GENERATION_JSON = "config.json", "params.json", "generation_config.json"
# Our key -> Hugging Face's and Mistral's; files mix them, so either is read from both.
REQUIRED_KEYS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "dim"),
    "num_layers": ("num_hidden_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_heads"),
    "n_kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "intermediate_size": ("intermediate_size", "hidden_dim"),
    "rms_norm_eps": ("rms_norm_eps", "norm_eps"),
    "theta": ("rope_theta",),
    "expert_num": ("num_local_experts", "num_experts"),
    "num_experts_chosen": ("num_experts_per_tok",),
}
OPTIONAL_KEYS: dict[str, tuple[str, ...]] = {
    "head_dim": ("head_dim",),
    "max_position_embedding": ("max_position_embeddings", "max_seq_len"),
    "sliding_window": ("sliding_window",),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
    "pad_token_id": ("pad_token_id",),
    "init_method_std": ("initializer_range",),
    "aux_loss_factor": ("router_aux_loss_coef",),
    "router_jitter": ("router_jitter_noise",),
}
# What transformers takes where its file does not say it, and we would take something else.
_THEIR_DEFAULTS: dict[str, Any] = {
    "max_position_embedding": 4096 * 32,
    "pad_token_id": NO_TOKEN,
    "aux_loss_factor": 0.001,
}
_FLOATS = {"rms_norm_eps", "theta", "init_method_std", "aux_loss_factor", "router_jitter"}
_MOE = {"expert_num", "num_experts_chosen", "aux_loss_factor", "router_jitter"}
_USUAL_SEQ_LENGTH = 4096
_ROPE_KEYS = ("rope_scaling", "rope_parameters")  # the first comes first in transformers, too
# What makes another network of it, wherever it stands: key -> the values that do not.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1, 1.0),
    "norm_topk_prob": (True,),
    "attention_bias": (False,),
    "num_shared_experts": (0,),
    "n_shared_experts": (0,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
}
# Facts about the file and the weights in it, and what is written anew in any case.
_NOT_KEPT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "hidden_act",
    "model_type",
    "moe",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    *_ROPE_KEYS,
}


@dataclass(frozen=True)
class FoundConfig:
    """A configuration, the file it is from, and what that file calls our keys.

    Attributes:
        config: the network.
        path: of the file.
        names: our key -> the file's.
        others: what stood in Hugging Face's files, by file, and has no key here: it is written
            back as it was.
    """

    config: MixtralConfig
    path: Path
    names: Mapping[str, str]
    others: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def name(self, ours: str) -> str:
        """The file's name of one of our keys."""
        return self.names.get(ours, ours)


def read_config(path: Path) -> FoundConfig:
    """Read a network's configuration from a YAML, config.json, params.json or one of our records.

    Raises:
        UserError: naming the file and the key that is missing, wrong or not Mixtral's.
    """
    if path.suffix in (".yaml", ".yml"):
        return FoundConfig(load_config(path).model.model_config, path, {})
    data = read_json_object(path)
    if (own := saved_network(data, path)) is not None:
        others = data.get(OTHERS_KEY, {})
        require_shape(others, {str: dict}, f"{path}: {OTHERS_KEY}")
        return FoundConfig(own, path, {}, others)
    return _foreign_config(data, path)


def says_network(path: Path) -> bool:
    """Whether a JSON file is to say the network's sizes: ours may be of weights of which none knew.

    Raises:
        UserError: it cannot be read.
    """
    if path.name in (CONFIG_JSON, PARAMS_JSON):
        return True
    data = read_json_object(path)
    ours = path.name == STATE or FORMAT_KEY in data
    return not ours or NETWORK_KEY in data


def _foreign_config(data: dict[str, Any], path: Path) -> FoundConfig:
    if data.get("model_type", "mixtral") != "mixtral":
        raise UserError(f"{path}: model_type is {data['model_type']!r}; only mixtral is converted")
    facts = list(_facts(data, path))
    _refuse_other_network(facts, path)
    values, names = _values(facts, path)
    others: dict[str, dict[str, Any]] = {}
    if path.name != PARAMS_JSON:
        values = {**_THEIR_DEFAULTS, **values}
        others[CONFIG_JSON] = _kept(data)
        _add_generation(values, data, others, path.with_name(GENERATION_JSON))
    values.setdefault("pad_token_id", NO_TOKEN)
    config = _from_values(values)
    if problems := network_problems(config):
        raise UserError(f"{path}: {'; '.join(_their_words(one, names) for one in problems)}")
    return FoundConfig(config, path, names, others)


def _facts(data: dict[str, Any], path: Path) -> Iterator[tuple[str, str, Any]]:
    """Every key with its place and value, those of the sections of rope and experts too."""
    for key, value in data.items():
        yield key, key, value
    for section in (*_ROPE_KEYS, "moe"):
        inside = data.get(section)
        if inside is None:
            continue
        require_shape(inside, {}, f"{path}: {section}")
        for key, value in inside.items():
            if isinstance(value, dict) and value:
                raise UserError(
                    f"{path}: {section}.{key} is a section: this network has one rotary embedding "
                    "for all layers"
                )
            yield key, f"{section}.{key}", value


def _refuse_other_network(facts: list[tuple[str, str, Any]], path: Path) -> None:
    for key, place, value in facts:
        if key == "type" and place == key:
            continue  # only of a rotary embedding
        if key in _ALLOWED and value is not None and value not in _ALLOWED[key]:
            allowed = " or ".join(repr(one) for one in (*_ALLOWED[key], None)[:1])
            raise UserError(f"{path}: {place} is {value!r}; this network only has {allowed}")


def _values(facts: list[tuple[str, str, Any]], path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What the file says of our keys, and under which name."""
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    for ours, spellings in (REQUIRED_KEYS | OPTIONAL_KEYS).items():
        said = [(place, value) for key, place, value in facts if key in spellings]
        given = [(place, value) for place, value in said if value is not None]
        if given:
            values[ours] = _one_value(given, ours, path)
            names[ours] = given[0][0]
        elif said and ours.endswith("_token_id"):
            values[ours], names[ours] = NO_TOKEN, said[0][0]
        elif ours in REQUIRED_KEYS and not (said and ours == "n_kv_heads"):
            raise UserError(_missing_text(ours, spellings, path))
    return values, names


def _one_value(given: list[tuple[str, Any]], ours: str, path: Path) -> Any:
    """The value of a fact that may be spelled more than once, which must then be one."""
    (place, first), *others = [(place, _typed(value, ours, place, path)) for place, value in given]
    for other, value in others:
        if value != first:
            raise UserError(
                f"{path}: {place} is {first!r} and {other} is {value!r}: one of them is wrong, and "
                "systems differ in which they take. Remove the one that the weights were not made "
                "with"
            )
    return first


def _missing_text(ours: str, spellings: tuple[str, ...], path: Path) -> str:
    text = f"{path}: lacks the key {' or '.join(spellings)}"
    if ours == "theta":
        text += (
            ": with another base of the rotary embedding the model talks nonsense, so it is not "
            'guessed. Mixtral 8x7B and 8x22B have "rope_theta": 1000000.0'
        )
    return f"{text}. Add it to the file, or give --config a YAML or JSON that has it"


def _typed(value: Any, ours: str, place: str, path: Path) -> Any:
    if ours == "eos_token_id" and isinstance(value, list) and value:
        return [_typed(one, "bos_token_id", place, path) for one in value]
    if ours == "tie_word_embeddings":
        right, expected = isinstance(value, bool), "true or false"
    elif ours in _FLOATS:
        right, expected = _is_number(value, int | float), "a number"
    else:
        right, expected = _is_number(value, int), "a whole number"
    if not right:
        raise UserError(f"{path}: {place} is {value!r}; it must be {expected}")
    return float(value) if ours in _FLOATS else value


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _kept(data: dict[str, Any]) -> dict[str, Any]:
    """What of config.json has no key here."""
    known = {key for keys in (REQUIRED_KEYS | OPTIONAL_KEYS).values() for key in keys}
    return {key: one for key, one in data.items() if key not in known | _NOT_KEPT}


def _add_generation(
    values: dict[str, Any], data: dict[str, Any], others: dict[str, dict[str, Any]], file: Path
) -> None:
    """Take the ids that end an answer from generation_config.json too, as transformers does."""
    if not file.is_file():
        return
    generation = others[GENERATION_JSON] = read_json_object(file)
    given = generation.get("eos_token_id")
    if given is None:
        return
    ids = _as_list(_typed(given, "eos_token_id", "eos_token_id", file))
    before = [one for one in _as_list(values.get("eos_token_id", [])) if one != NO_TOKEN]
    united = list(dict.fromkeys([*before, *ids]))
    if united != before:
        values["eos_token_id"] = united if len(united) > 1 else united[0]
        if "eos_token_id" in data:
            others[CONFIG_JSON]["eos_token_id"] = data["eos_token_id"]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _from_values(values: dict[str, Any]) -> MixtralConfig:
    moe = MoEConfig(**{key: values.pop(key) for key in _MOE & values.keys()})
    longest = values.get("max_position_embedding") or _USUAL_SEQ_LENGTH
    seq_length = max(1, min(longest, _USUAL_SEQ_LENGTH))
    return MixtralConfig(**values, seq_length=seq_length, moe_config=moe)


def _their_words(problem: str, names: Mapping[str, str]) -> str:
    """A problem of our keys in the names that the file has for them."""
    for prefix in ("model.model_config.", "model_config.", "moe_config."):
        for ours, theirs in names.items():
            problem = problem.replace(f"{prefix}{ours} ", f"{theirs} ")
    return problem


def check_sizes(found: FoundConfig, sizes: Mapping[str, Measured], tied: bool) -> None:
    """Compare a configuration with the tensors.

    Args:
        found: the configuration.
        sizes: what `measure` found.
        tied: whether the tensors lack a head of their own.

    Raises:
        UserError: they contradict; it names the key, the tensor and both numbers.
    """
    config = found.config
    heads, head_dim = found.name("num_heads"), found.name("head_dim")
    for size, key, value in (
        ("vocab_size", found.name("vocab_size"), config.vocab_size),
        ("hidden_size", found.name("hidden_size"), config.hidden_size),
        ("query_width", f"{heads} * {head_dim}", config.num_heads * config.head_dim),
        (
            "key_value_width",
            f"{found.name('n_kv_heads')} * {head_dim}",
            config.n_kv_heads * config.head_dim,
        ),
        ("intermediate_size", found.name("intermediate_size"), config.intermediate_size),
        ("expert_num", found.name("expert_num"), config.moe_config.expert_num),
        ("num_layers", found.name("num_layers"), config.num_layers),
    ):
        shown = sizes[size]
        if shown.value != value:
            raise UserError(
                f"{found.path}: {key} is {value}, but by the tensor {shown.tensor} of shape "
                f"{shown.shape} it is {shown.value}: the file is of other weights, or tensors are "
                "missing"
            )
    if config.tie_word_embeddings != tied:
        raise UserError(
            f"{found.path}: tie_word_embeddings is {config.tie_word_embeddings}, but the tensors "
            f"{'lack' if tied else 'hold'} a head of their own"
        )
