"""run --run_mode predict and complete, as a user types them."""

import io
import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from helpers.answering import CONTEXT, make_model, network, write_weights
from helpers.numpy_runner import random_tensors
from helpers.runs import ROOT, environment

from mixtral_ms import Trainer, load_config
from mixtral_ms.cli.commands.complete import main as complete
from mixtral_ms.cli.commands.run import main as run
from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer
from mixtral_ms.errors import UserError

REFERENCE = sentencepiece.SentencePieceProcessor(model_file=str(find_example_tokenizer()))
PROMPTS = ["I love Beijing, because", "hello", "The import statement is used to"]
LONG = "word " * CONTEXT
NEW = ("--max_new_tokens", "6")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The YAML of a small network beside its weights."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def predict(model, capsys):
    """Runs the command; gives its status, stdout and stderr."""

    def typed(*arguments, main=run):
        status = run_command(main, ["--config", str(model), *map(str, arguments)])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return status, printed.out, printed.err

    return typed


def records(path):
    with open(path, encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def alone(model):
    """Each prompt's greedy answer, one process's work a prompt."""
    trainer = Trainer(load_config(model, ["model.model_config.max_new_tokens=6"]))
    return [trainer.predict(prompt)[0] for prompt in PROMPTS]


def test_the_launcher_from_another_folder(model, alone, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "run_mindformer.py", "--config", model),
            *("--run_mode", "predict", "--load_checkpoint", model.parent / "weights"),
            *("--auto_trans_ckpt", "True", "--predict_data", PROMPTS[0], *NEW),
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{PROMPTS[0]}{alone[0].text}\n"
    assert re.search(r"(C\+\+|graph) runner, float32 weights .*loaded in [\d.]+ s", done.stderr)
    assert re.search(r"first token after [\d.]+ s; 6 tokens in [\d.]+ s, [\d.]+ tok", done.stderr)


def test_the_cpp_runner_answers_without_mindspore(model):
    """Whose import takes longer than all of this."""
    code = (
        "import sys; from mixtral_ms import Trainer; trainer = Trainer(sys.argv[1]); "
        "trainer.predict('hello'); print(trainer.model.runner, 'mindspore' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout in {"C++ False\n", "graph True\n"}  # graph where there is no compiler


def test_the_reference_documents_command(model, capsys):
    """As it stands there, on a CPU and with the small network's sizes."""
    small = network(model)
    sizes = ("hidden_size", "num_layers", "num_heads", "n_kv_heads", "intermediate_size")
    settings = [f"model.model_config.{key}={getattr(small, key)}" for key in sizes]
    status = run_command(run, [
        *("--config", str(ROOT / "research/mixtral_8x7b/predict_mixtral-8x7b.yaml")),
        *("--run_mode", "predict", "--use_parallel", "False", "--device_target", "CPU"),
        *("--load_checkpoint", str(model.parent / "weights"), "--auto_trans_ckpt", "True"),
        *("--predict_data", PROMPTS[0], *NEW),
        *("--options", *settings, "model.model_config.theta=10000.0", "moe_config.expert_num=4"),
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed.err
    answers = Trainer(load_config(model, ["model.model_config.max_new_tokens=6"])).predict(PROMPTS)
    assert printed.out == f"{PROMPTS[0]}{answers[0].text}\n"


def test_a_single_prompt_streams_in_a_terminal(model, alone):
    own, theirs = pty.openpty()
    command = [sys.executable, "-m", "mixtral_ms", "run", "--config", str(model)]
    with subprocess.Popen(
        [*command, "--predict_data", PROMPTS[0], *NEW], stdout=theirs, env=environment()
    ) as process:
        os.close(theirs)
        pieces = []
        try:
            while piece := os.read(own, 4096):
                pieces.append(piece)
        except OSError:  # Linux says so when the other end is closed
            pass
    assert process.returncode == 0
    shown = b"".join(pieces).decode().replace("\r\n", "\n")
    assert shown == f"{PROMPTS[0]}{alone[0].text}\n"


def test_answers_of_several_prompts_in_order(predict, alone, tmp_path):
    file = tmp_path / "new" / "answers.jsonl"
    status, out, err = predict(
        "--predict_data", *PROMPTS, *NEW, "--logprobs", "--output_file", file
    )
    assert status == 0, err
    for row, prompt, single in zip(records(file), PROMPTS, alone, strict=True):
        assert (row["prompt"], row["text"]) == (prompt, single.text)
        assert row["token_ids"] == list(single.token_ids)
        assert (row["finish_reason"], row["error"]) == ("length", None)
        assert row["prompt_tokens"] == 1 + len(REFERENCE.encode(prompt))
        assert len(row["logprobs"]) == 6
        assert max(row["logprobs"]) <= 0
        assert 0 < row["first_token_seconds"] <= row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(6 / row["seconds"])
        assert f"{prompt}{single.text}\n(log-probability {sum(row['logprobs']):.3f}, " in out
    assert out.count("--- ") == 3


@pytest.mark.parametrize("flags", [(), ("--predict_batch_size", "2"), ("--use_past", "False")])
def test_the_batch_changes_no_sampled_answer(predict, tmp_path, flags):
    file = tmp_path / "a.jsonl"
    if flags[:1] == ("--use_past",):
        flags = ("--set", "model.model_config.use_past=False")
    common = ("--do_sample", "True", "--temperature", 0.9, "--top_k", 50, "--seed", 7, *NEW)
    assert predict("--predict_data", *PROMPTS, *common, *flags, "--output_file", file)[0] == 0
    for number, row in enumerate(records(file)):
        one = tmp_path / f"{number}.jsonl"
        predict("--predict_data", PROMPTS[number], *common, "--output_file", one)
        assert records(one)[0]["token_ids"] == row["token_ids"]
    again = tmp_path / "b.jsonl"
    predict("--predict_data", *PROMPTS, *common, "--seed", 8, "--output_file", again)
    assert [r["token_ids"] for r in records(again)] != [r["token_ids"] for r in records(file)]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("repetition_penalty", 4),
        ("presence_penalty", 30),
        ("num_beams", 3),
        ("weight_dtype", "int8"),
    ],
)
def test_flags_reach_the_answer(model, predict, tmp_path, flag, value):
    """A flag gives what its key gives in Python; both differ from neither."""
    texts = {}
    prompts = ["a b c d e f g", *PROMPTS]
    key = {f.attribute: f.keys[0] for f in _flags()}[flag]
    for name, typed, settings in (
        ("with", (f"--{flag}", value), [f"{key}={value}"]),
        ("without", (), []),
    ):
        file = tmp_path / f"{name}.jsonl"
        done = predict("--predict_data", *prompts, "--max_new_tokens", 24, "--logprobs",
                       "--output_file", file, *typed)  # fmt: skip
        assert done[0] == 0, done[2]
        always = ["model.model_config.max_new_tokens=24", "generation.logprobs=True"]
        answers = Trainer(load_config(model, [*always, *settings])).predict(prompts)
        texts[name] = [(r["token_ids"], r["logprobs"]) for r in records(file)]
        assert texts[name] == [(list(a.token_ids), list(a.logprobs)) for a in answers]
    assert texts["with"] != texts["without"]


def _flags():
    from mixtral_ms.cli.support.run_flags import FLAGS  # noqa: PLC0415

    return FLAGS


def test_stop_ends_the_answer(predict, alone, tmp_path):
    stop = alone[1].text[3:6]
    file = tmp_path / "a.jsonl"
    predict("--predict_data", "hello", "--stop", stop, "--stop", "zzz", *NEW, "--output_file", file)
    (row,) = records(file)
    assert (row["text"], row["finish_reason"]) == (alone[1].text.split(stop)[0], "stop")


# -- where prompts come from ------------------------------------------------------------------


def test_prompts_from_files_and_stdin(predict, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("one\r\n\ntwo\u2028half\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"prompt": "three\\nlines", "id": 1}\n\n{"prompt": "4"}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("five\nsix"))
    file = tmp_path / "a.jsonl"
    status, _, err = predict(
        *("--predict_data", tmp_path / "p.txt", "see file.txt", tmp_path / "p.jsonl", "-"),
        *("--max_new_tokens", 1, "--output_file", file),
    )
    assert status == 0, err
    expected = ["one", "two\u2028half", "see file.txt", "three\nlines", "4", "five", "six"]
    assert [row["prompt"] for row in records(file)] == expected


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        (None, b"", "no prompt: set --predict_data"),
        ("gone.txt", None, "file does not exist: gone.txt"),
        ("empty.txt", b"\n\n", "no prompt: set --predict_data"),
        ("latin.txt", b"caf\xe9", "latin.txt: byte 0xe9 at offset 3 is not UTF-8"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"text": "b"}',
            'a.jsonl:2: must be an object with a text "',
        ),
        ("b.jsonl", b"{'prompt': 1}", "b.jsonl:1: is not JSON"),
    ],
)
def test_wrong_prompts_are_one_line(predict, tmp_path, monkeypatch, name, content, part):
    monkeypatch.chdir(tmp_path)
    if content is not None and name:
        (tmp_path / name).write_bytes(content)
    status, out, err = predict(*(("--predict_data", name) if name else ()))
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert part in err


# -- faults -----------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_harms_no_other(predict, alone, tmp_path):
    file = tmp_path / "a.jsonl"
    status, out, err = predict(
        "--predict_data", PROMPTS[0], LONG, PROMPTS[1], *NEW, "--output_file", file
    )
    assert status == 1
    rows = records(file)
    assert [row["finish_reason"] for row in rows] == ["length", "error", "length"]
    assert [rows[0]["text"], rows[2]["text"]] == [alone[0].text, alone[1].text]
    tokens = 1 + len(REFERENCE.encode(LONG))
    said = f"the prompt has {tokens} tokens and the context (seq_length) is {CONTEXT}"
    assert said in rows[1]["error"]
    assert f"error: prompt 2 ('{LONG[:40]}…'): {said}" in err


def test_an_existing_output_is_kept(predict, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("mine")
    never_opened = ("--load_checkpoint", tmp_path / "gone")
    status, _, err = predict("--predict_data", "x", *NEW, "--output_file", file, *never_opened)
    assert status == 2
    assert "--overwrite" in err
    assert file.read_text() == "mine"
    assert predict("--predict_data", "x", *NEW, "--output_file", file, "--overwrite")[0] == 0
    assert records(file)[0]["prompt"] == "x"


W2 = "model.layers.1.feed_forward.routed_experts.ffn.w2.weight"


def damaged(folder, config, what):
    """Weights with something wrong in `folder`; gives the folder."""
    if what == "nan":
        write_weights(folder, config, **{W2: lambda w: np.where(w > 1, np.nan, w)})
    elif what == "shape":
        write_weights(folder, config, **{W2: lambda w: w[:, :, 1:]})
    elif what == "huge":
        write_weights(folder, config, **{W2: lambda w: w * 1e6})
    elif what == "partial":
        from safetensors.numpy import save_file  # noqa: PLC0415

        folder.mkdir()
        tensors = random_tensors(config)
        del tensors[W2]
        save_file(tensors, folder / "model.safetensors")
    elif what == "truncated":
        write_weights(folder, config)
        with open(folder / "model.safetensors", "r+b") as file:
            file.truncate(100_000)
    return folder


@pytest.mark.parametrize(
    ("what", "flags", "part"),
    [
        ("nan", (), f"NaN or infinity as float32 in {W2}"),
        ("huge", ("--weight_dtype", "float16"), "give --weight_dtype float32"),
        ("shape", (), f"{W2} has shape"),
        ("partial", (), W2),
        ("truncated", (), "model.safetensors"),
        ("absent", (), "path does not exist"),
    ],
)
def test_damaged_weights_are_one_error(model, predict, tmp_path, what, flags, part):
    folder = damaged(tmp_path / "bad", network(model), what)
    file = tmp_path / "a.jsonl"
    vocab = model.parent / "weights" / "tokenizer.model"
    status, out, err = predict(
        *("--load_checkpoint", folder, "--vocab_file", vocab, "--predict_data", "x"),
        *("--output_file", file, *flags),
    )
    assert (status, out) == (2, "")
    assert "error: " in err
    assert part in err
    assert not file.exists()


def test_the_tokenizer_must_fit_the_vocabulary(model, predict, tmp_path):
    from dataclasses import replace  # noqa: PLC0415

    write_weights(tmp_path / "small", replace(network(model), vocab_size=500))
    status, _, err = predict(
        *("--load_checkpoint", tmp_path / "small", "--set", "model.model_config.vocab_size=500"),
        *("--vocab_file", model.parent / "weights" / "tokenizer.model", "--predict_data", "x"),
    )
    assert status == 2
    assert "the tokenizer has 32000 pieces and the network vocab_size 500" in err


def test_the_tokenizer_is_asked_for(model, predict, tmp_path):
    write_weights(tmp_path / "bare", network(model))
    status, _, err = predict("--load_checkpoint", tmp_path / "bare", "--predict_data", "x")
    assert status == 2
    assert "set --vocab_file" in err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--top_p", "0"), "model.model_config.top_p is 0"),
        (("--min_p", "2"), "generation.min_p is 2"),
        (("--num_beams", "2", "--do_sample", "True"), "num_beams 2 does not go with do_sample"),
        (("--load_checkpoint", ""), "set --load_checkpoint"),
        (("--use_parallel", "True", "--parallel_config.model_parallel", "2"), "2 ranks, but 1"),
        (("--output_file", "/proc/none/x"), "--output_file /proc/none/x"),
        (("--output_file", "/tmp"), "is a folder"),
    ],
)
def test_wrong_flags_are_named(model, predict, flags, part):
    vocab = model.parent / "weights" / "tokenizer.model"
    status, out, err = predict("--vocab_file", vocab, "--predict_data", "x", *flags)
    assert (status, out) == (2, "")
    assert part in err


def test_add_bos_token_is_the_yamls(predict, tmp_path):
    rows = []
    for bos in (True, False):
        file = tmp_path / f"{bos}.jsonl"
        flags = ("--set", f"processor.tokenizer.add_bos_token={bos}", "--output_file", file)
        predict("--predict_data", " hello", *NEW, *flags)
        rows += records(file)
    assert [row["prompt"] for row in rows] == [" hello", " hello"]
    assert rows[0]["prompt_tokens"] == rows[1]["prompt_tokens"] + 1
    assert rows[0]["token_ids"] != rows[1]["token_ids"]


# -- Python, and complete ---------------------------------------------------------------------


def test_the_trainer_needs_a_prompt(model):
    with pytest.raises(UserError, match="set --predict_data"):
        Trainer(model).predict()


def test_complete_frames_its_examples(predict, alone):
    status, out, _ = predict(PROMPTS[0], *NEW, PROMPTS[1], LONG, main=complete)
    assert status == 1
    examples = re.findall(
        r"=+Example START=+\n\n\[Prompt\]:\n(.*?)\n\n\[Response\]:\n(.*?)\n\n=+Example END=+\n",
        out,
        re.S,
    )
    assert examples[:2] == [(PROMPTS[i], alone[i].text) for i in range(2)]
    assert examples[2][0] == LONG
    assert "the prompt has" in examples[2][1]


def test_complete_has_help_with_an_example(capsys):
    with pytest.raises(SystemExit) as leaving:
        complete(["--help"])
    assert leaving.value.code == 0
    assert "example:\n  python -m mixtral_ms complete --config" in capsys.readouterr().out
