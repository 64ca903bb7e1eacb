"""Kinds of file that commands read: how a sound one is made, read, and what damage may do to it."""

import dataclasses
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from helpers import convert_oracle
from mixtral_ms.checkpoint.formats.open_file import open_tensors
from mixtral_ms.checkpoint.formats.strategy_file import read_strategies
from mixtral_ms.checkpoint.reshard.open_checkpoint import open_source
from mixtral_ms.checkpoint.reshard.transform_checkpoint import TransformOptions, transform
from mixtral_ms.checkpoint.store.manifest import MANIFEST, MANIFEST_HASH, STATE
from mixtral_ms.checkpoint.store.store import load_checkpoint, save_checkpoint
from mixtral_ms.config import load_config
from mixtral_ms.config.loading.render import render_config
from mixtral_ms.convert.formats.found_weights import Flags, find_weights
from mixtral_ms.convert.formats.weight_view import open_weights
from mixtral_ms.convert.job.conversion import ConvertOptions, convert, prepare
from mixtral_ms.data.conversations.alpaca_converter import convert_alpaca
from mixtral_ms.data.conversations.conversation_samples import ConversationOptions, Conversations
from mixtral_ms.data.readers.json_and_parquet import read_rows
from mixtral_ms.data.readers.row_log import RowLog
from mixtral_ms.data.readers.text_blocks import read_text_blocks
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer
from mixtral_ms.data.tokenizer.tokenizer import Tokenizer
from mixtral_ms.errors import UserError
from mixtral_ms.infer.text.chat_history import ChatHistory
from mixtral_ms.infer.text.prompts import read_prompts
from mixtral_ms.train.report.metrics import read_metrics
from mixtral_ms.train.report.report import read_samples

TEXT = "The cat sat on the mat.\nIt slept; a \u4f60\u597d and \U0001f600 too.\n\n" * 9


class FuzzKind(NamedTuple):
    """One kind of file."""

    make: Callable[[Path], Path]
    """Makes a sound one in a folder, with what belongs to it; gives the file to be damaged."""
    read: Callable[[Path], Any]
    """Reads that file as a command does; gives what it holds."""
    exact: bool = False
    """A hash or an invariant is held: what is read is right, or it is refused."""
    after: Callable[[Path], None] = lambda path: None
    """What a hostile author does after changing it: signs it again."""
    part: Callable[[bytes], slice] = lambda data: slice(None)
    """Which part of the file is damaged."""


def digest(value: object) -> str:
    """Tells two values read from a file apart."""
    found = hashlib.sha256()
    _add(found, value)
    return found.hexdigest()


def _add(found: Any, value: object) -> None:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            _add(found, (key, value[key]))
    elif isinstance(value, list | tuple):
        found.update(f"[{len(value)}".encode())
        for item in value:
            _add(found, item)
    elif isinstance(value, np.ndarray):
        found.update(str((value.shape, value.dtype)).encode() + value.tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _add(found, vars(value))
    else:
        found.update(repr(value).encode(errors="backslashreplace"))


def _nothing(used: int) -> None:
    """Progress that nobody sees."""


# -- weights --------------------------------------------------------------------------------


def _source_tensors(source: Any) -> dict[str, Any]:
    return {name: (info.shape, source.read(name)) for name, info in source.infos.items()}


def _file_tensors(path: Path) -> dict[str, Any]:
    return _source_tensors(open_tensors(path))


def _hf(folder: Path) -> Path:
    convert_oracle.write_source(folder / "hf", "hf")
    return folder / "hf"


def _hf_config(folder: Path) -> Path:
    return _hf(folder) / "config.json"


def _hf_generation(folder: Path) -> Path:
    path = _hf(folder) / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.7}))
    return path


def _mistral_params(folder: Path) -> Path:
    source = folder / "mistral"
    convert_oracle.write_source(source, "native")
    (source / "model.safetensors").rename(source / "consolidated.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").unlink()
    names = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "hidden_dim",
        "rms_norm_eps": "norm_eps",
    }
    params = {new: config[old] for old, new in names.items()}
    params |= {name: config[name] for name in ("head_dim", "vocab_size", "rope_theta")}
    params["moe"] = {"num_experts_per_tok": 2, "num_experts": config["num_local_experts"]}
    (source / "params.json").write_text(json.dumps(params))
    return source / "params.json"


def _hf_index(folder: Path) -> Path:
    convert(prepare(ConvertOptions(_hf(folder), folder / "cut", "hf", max_shard_bytes=3000)))
    (folder / "cut" / "conversion.json").unlink()
    return folder / "cut" / "model.safetensors.index.json"


def _hf_network(path: Path) -> Any:
    """Of a folder with config.json: what it is, and its tensors."""
    found = find_weights(path.parent if path.suffix == ".json" else path, Flags("model"))
    network = found.network
    if network is None:
        raise UserError(f"{path}: no configuration lies with it")
    return network.config, _source_tensors(open_weights(found, network.config))


def _converted(folder: Path) -> Path:
    convert(prepare(ConvertOptions(_hf(folder), folder / "m.safetensors", "ours")))
    return folder / "m.safetensors"


def _record(folder: Path) -> Path:
    path = _converted(folder)
    return path.with_name(path.name + ".json")


def _converted_tensors(path: Path) -> Any:
    path = path.with_name("m.safetensors")
    return _hf_network(path)[1]


def _one(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        to = folder / f"one{suffix}"
        convert(prepare(ConvertOptions(_hf(folder), to, "ours")))
        to.with_name(to.name + ".json").unlink()
        return to

    return make


def _torch(folder: Path) -> Path:
    import torch  # noqa: PLC0415 - seconds

    weights = {"a": torch.arange(24.0).reshape(4, 6), "b": torch.ones(3, dtype=torch.bfloat16)}
    torch.save(weights, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def _pickle(folder: Path) -> Path:
    with zipfile.ZipFile(_torch(folder)) as archive:
        (name,) = [one for one in archive.namelist() if one.endswith("data.pkl")]
        (folder / "data.pkl").write_bytes(archive.read(name))
    return folder / "data.pkl"


def _zip_again(path: Path) -> None:
    """Put the damaged pickle into the file that is read."""
    whole = path.with_name("pytorch_model.bin")
    copy = io.BytesIO()
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            new.writestr(name, path.read_bytes() if name.endswith("data.pkl") else old.read(name))
    whole.write_bytes(copy.getvalue())


def _read_zip(path: Path) -> Any:
    return _file_tensors(path.with_name("pytorch_model.bin"))


def _header(data: bytes) -> slice:
    return slice(8, 8 + int.from_bytes(data[:8], "little"))


# -- checkpoints ----------------------------------------------------------------------------


def _cut(folder: Path) -> Path:
    transform(TransformOptions(_one(".safetensors")(folder), folder / "ckpt", dst_strategy="mp=2"))
    return folder / "ckpt"


def _rank_file(folder: Path) -> Path:
    return sorted(_cut(folder).rglob("*.safetensors"))[1]


def _strategy(folder: Path) -> Path:
    return sorted(_cut(folder).rglob("*strategy*.ckpt"))[0]


def _checkpoint_of(path: Path) -> Path:
    return next(one for one in path.parents if (one / MANIFEST).is_file())


def _cut_tensors(path: Path) -> Any:
    return _source_tensors(open_source(_checkpoint_of(path)).tensors)


def _saved(folder: Path) -> Path:
    tensors = {"model": {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}}
    state = {"step": 3, "seed": 1, "loss_scale": {"value": 2.0, "good_steps": 1,
             "skipped_in_a_row": 0}}  # fmt: skip
    return save_checkpoint(folder, "one", tensors, state)


def _saved_tensors(path: Path) -> Any:
    loaded = load_checkpoint(path.parent)
    groups = {name: dict(group) for name, group in loaded.tensors.items()}
    return loaded.state, groups


def _sign(path: Path) -> None:
    """Give the manifest, and the state in it, the hashes that they now have."""
    folder = path.parent
    if path.name == STATE:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["state_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / MANIFEST).write_text(json.dumps(manifest))
    hash_ = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    (folder / MANIFEST_HASH).write_text(f"{hash_}  {MANIFEST}\n")


# -- data -----------------------------------------------------------------------------------


ROWS = [{"text": f"row {number} \u4f60", "id": number, "n": number / 3} for number in range(20)]
TALKS = [
    {"conversations": [{"from": "human", "value": f"Say {number}"},
                       {"from": "gpt", "value": f"It is {number}."}]}
    for number in range(8)
]  # fmt: skip
ALPACA = [{"instruction": f"do {n}", "input": "", "output": f"done {n}"} for n in range(8)]


def _text(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    return make


def _lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _parquet(folder: Path) -> Path:
    import pyarrow  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder / "rows.parquet"


def _rows(path: Path) -> Any:
    return [row.value for row in read_rows(path, _nothing)]


def _talks(path: Path) -> Any:
    options = ConversationOptions(
        str(find_example_tokenizer()), seq_length=64, tokenizer_backend="sentencepiece"
    )
    return list(Conversations([path], options, RowLog()).samples(_nothing))


def _alpaca(path: Path) -> Any:
    out = path.with_name("out.json")
    convert_alpaca(path, out, overwrite=True)
    return json.loads(out.read_text(encoding="utf-8"))


def _records(folder: Path) -> Path:
    from mixtral_ms.data.mindrecord.writer import RecordWriter  # noqa: PLC0415 - MindSpore

    ids = np.random.default_rng(0).integers(0, 9000, (20, 9), dtype=np.int32)
    with RecordWriter(folder / "d.mindrecord", ("input_ids",)) as writer:
        writer.write(input_ids=ids)
    return folder / "d.mindrecord"


def _record_index(folder: Path) -> Path:
    return _records(folder).with_name("d.mindrecord.db")


def _read_records(path: Path) -> Any:
    from mixtral_ms.data.mindrecord.reader import MindRecords  # noqa: PLC0415

    records = MindRecords(path.with_name("d.mindrecord"), ["input_ids"])
    return [list(one) for one in records.read(list(range(len(records))))]


def _tokenizer(folder: Path) -> Path:
    return Path(shutil.copy(find_example_tokenizer(), folder / "tokenizer.model"))


def _encoded(path: Path) -> Any:
    tokenizer = Tokenizer(path, "sentencepiece")
    ids = tokenizer.encode(TEXT[:60])
    return ids, tokenizer.decode(ids), tokenizer.bos_id, tokenizer.eos_id


# -- answers and runs -----------------------------------------------------------------------


def _chat(path: Path) -> Any:
    history = ChatHistory(lambda messages: [])
    history.load(path)
    return history.system, history.turns


TURNS = [
    {"role": ("user", "assistant")[number % 2], "content": f"turn {number}"} for number in range(6)
]
METRICS = [{"kind": "train", "step": step, "loss": 1 / (step + 1)} for step in range(20)]
SAMPLES = [{"prompt": f"p{n}", "expected": "e", "before": "b"} for n in range(4)]
YAML = Path(__file__).parents[2] / "research" / "mixtral_tiny" / "pretrain_mixtral-tiny.yaml"

KINDS = {
    "safetensors": FuzzKind(_one(".safetensors"), _file_tensors),
    "safetensors header": FuzzKind(_one(".safetensors"), _file_tensors, part=_header),
    "MindSpore ckpt": FuzzKind(_one(".ckpt"), _file_tensors),
    "PyTorch zip": FuzzKind(_torch, _file_tensors),
    "PyTorch pickle": FuzzKind(_pickle, _read_zip, after=_zip_again),
    "config.json": FuzzKind(_hf_config, _hf_network),
    "generation_config.json": FuzzKind(_hf_generation, _hf_network),
    "params.json": FuzzKind(_mistral_params, _hf_network),
    "shard index": FuzzKind(_hf_index, lambda path: _hf_network(path.parent)),
    "converted file": FuzzKind(_converted, _converted_tensors, exact=True),
    "conversion record": FuzzKind(_record, _converted_tensors, exact=True),
    "rank file": FuzzKind(_rank_file, _cut_tensors, exact=True),
    "strategy file": FuzzKind(_strategy, read_strategies),
    "strategy of a checkpoint": FuzzKind(_strategy, _cut_tensors, exact=True),
    "manifest": FuzzKind(lambda f: _saved(f) / MANIFEST, _saved_tensors, exact=True),
    "manifest, signed": FuzzKind(lambda f: _saved(f) / MANIFEST, _saved_tensors, after=_sign),
    "state": FuzzKind(lambda f: _saved(f) / STATE, _saved_tensors, exact=True),
    "state, signed": FuzzKind(lambda f: _saved(f) / STATE, _saved_tensors, after=_sign),
    "tokenizer.model": FuzzKind(_tokenizer, _encoded),
    "JSON lines": FuzzKind(_text("rows.jsonl", _lines(ROWS)), _rows),
    "JSON list": FuzzKind(_text("rows.json", json.dumps(ROWS)), _rows),
    "Parquet": FuzzKind(_parquet, _rows),
    "text": FuzzKind(_text("a.txt", TEXT), lambda path: "".join(read_text_blocks(path, _nothing))),
    "conversations": FuzzKind(_text("qa.json", json.dumps(TALKS)), _talks),
    "Alpaca rows": FuzzKind(_text("al.json", json.dumps(ALPACA)), _alpaca),
    "MindRecord": FuzzKind(_records, _read_records),
    "MindRecord index": FuzzKind(_record_index, _read_records, exact=True),
    "prompts": FuzzKind(_text("p.txt", TEXT), lambda path: read_prompts(str(path))),
    "prompts as JSON lines": FuzzKind(
        _text("p.jsonl", _lines([{"prompt": row["text"]} for row in ROWS])),
        lambda path: read_prompts(str(path)),
    ),
    "saved chat": FuzzKind(_text("c.json", json.dumps({"messages": TURNS})), _chat),
    "YAML": FuzzKind(
        _text("run.yaml", YAML.read_text(encoding="utf-8")),
        lambda path: render_config(load_config(path)),
    ),
    "metrics": FuzzKind(_text("metrics.jsonl", _lines(METRICS)), read_metrics),
    "samples": FuzzKind(
        _text("samples.json", json.dumps(SAMPLES)), lambda path: read_samples(path.parent)
    ),
}
