import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from mindspore.dataset import MindDataset

from mixtral_ms.cli.commands.preprocess import main
from mixtral_ms.cli.support.exit_status import SignalInterrupt, run_command
from mixtral_ms.data.documents import wikitext as wiki_module
from mixtral_ms.data.mindrecord.writer import RecordWriter
from mixtral_ms.data.readers import text_blocks as text_module
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer
from mixtral_ms.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "dataset_preprocess" / "llama_preprocess.py"
MODEL = str(find_example_tokenizer())
REFERENCE = sentencepiece.SentencePieceProcessor(model_file=MODEL)

TITLES = " \n = Title <unk> = \n \n"
BODIES = [f"Body {number} costs 1 @,@ 000 , </s> <unk> . " for number in range(40)]
CLEAN = [f"Body {number} costs 1,000, </s> <unk>." for number in range(40)]


def stream(documents, bos=True, eos=True):
    """The ids that the documents give by plain sentencepiece."""
    before, after = [1] * bos, [2] * eos
    return sum((before + REFERENCE.encode(one) + after for one in documents), [])


def records(path):
    data = MindDataset([str(path)], columns_list=["input_ids"], shuffle=False)
    rows = data.create_tuple_iterator(num_epochs=1, output_numpy=True)
    return np.stack([row[0] for row in rows])


def assert_holds(path, ids, seq_length):
    rows = records(path)
    length = seq_length + 1
    assert rows.dtype == np.int32
    assert rows.reshape(-1).tolist() == ids[: len(ids) // length * length]


@pytest.fixture
def wiki(tmp_path):
    """Two files, in an order that only sorting gives; their 40 documents in order are CLEAN."""
    for name, bodies in (("b.tokens", BODIES[20:]), ("a.tokens", BODIES[:20])):
        text = "".join(f"{TITLES} {body}\n" for body in bodies)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def run(folder, *more, pattern="*.tokens", seq_length=16, model=MODEL):
    flags = {"--input_glob": folder / pattern, "--model_file": model, "--seq_length": seq_length}
    flags["--output_file"] = folder / "out" / "wiki.mindrecord"
    argv = [str(one) for pair in flags.items() for one in pair]
    return run_command(main, [*argv, *more])


def output(folder):
    return folder / "out" / "wiki.mindrecord"


@pytest.mark.slow
def test_the_tool_as_a_user_types_it_from_another_folder(wiki):
    result = subprocess.run(
        [
            *(sys.executable, TOOL, "--dataset_type", "wiki", "--input_glob", "*.tokens"),
            *("--model_file", MODEL, "--seq_length", "16", "--output_file", "w.mindrecord"),
        ],
        cwd=wiki,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    ids = stream(CLEAN)
    assert_holds(wiki / "w.mindrecord", ids, 16)
    assert re.search(r"documents: +40 from 2 files", result.stdout)
    assert re.search(rf"tokens: +{len(ids):,}\n", result.stdout)
    assert re.search(rf"records: +{len(ids) // 17:,} of 17 ids", result.stdout)
    assert re.search(rf"dropped: +{len(ids) % 17} tokens", result.stdout)
    assert "--train_data" in result.stdout


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:\n  python tools/dataset_preprocess/llama_preprocess.py" in printed


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_bos_and_eos_are_switchable(wiki, bos, eos):
    assert run(wiki, "--add_bos", str(bos), "--add_eos", str(eos).lower()) == 0
    assert_holds(output(wiki), stream(CLEAN, bos, eos), 16)


@pytest.mark.parametrize("backend", ["kitoken", "gigatoken", "sentencepiece"])
def test_backends_write_the_same(wiki, backend):
    assert run(wiki, "--tokenizer_backend", backend, "--repeat", "3") == 0
    assert_holds(output(wiki), stream(CLEAN * 3), 16)


def test_text_that_is_not_wikitexts_is_said_to_change(wiki, capfd):
    assert run(wiki) == 0
    assert "clean" not in capfd.readouterr().err
    (wiki / "a.txt").write_text("We drew N samples of vitamin N\n\n" * 9)
    assert run(wiki, "--overwrite", pattern="a.txt") == 0
    assert "a lone N becomes 1; --clean_text False keeps" in capfd.readouterr().err
    assert_holds(output(wiki), stream(["We drew 1 samples of vitamin 1"] * 9), 16)
    assert run(wiki, "--overwrite", "--clean_text", "False", pattern="a.txt") == 0
    assert "becomes 1" not in capfd.readouterr().err
    assert_holds(output(wiki), stream(["We drew N samples of vitamin N"] * 9), 16)


@pytest.mark.parametrize("repeat", ["1", "3"])
def test_rows_without_text_are_named_and_listed(tmp_path, capsys, repeat):
    rows = [{"text": one} for one in ("one " * 40, "", None, "   ", "two " * 40)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    more = ("--dataset_type", "wikipedia", "--repeat", repeat)
    assert run(tmp_path, *more, pattern="a.json") == 0
    assert_holds(output(tmp_path), stream(["one " * 40, "two " * 40] * int(repeat)), 16)
    printed = capsys.readouterr().out
    assert "rows:      5 read, 2 taken; 3 left out" in printed
    assert "row 3 of a.json: left out: its 'text' is white space only" in printed
    listed = Path(f"{output(tmp_path)}.rows.jsonl").read_text().splitlines()
    assert [json.loads(one)["row"] for one in listed] == [1, 2, 3]


def test_long_documents_are_written_as_one(tmp_path, monkeypatch):
    words = "  a <s> b\n" + "word  and another. " * 500 + "end"
    (tmp_path / "a.tokens").write_text(words)
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 100)
    monkeypatch.setattr(wiki_module, "LONG_TEXT", 50)
    assert run(tmp_path, "--clean_text", "False") == 0
    assert_holds(output(tmp_path), stream([words.strip()]), 16)


def test_samples_num_stops(wiki, capsys):
    assert run(wiki, "--samples_num", "5") == 0
    assert_holds(output(wiki), stream(CLEAN)[: 5 * 17], 16)
    assert "records:   5 of 17" in capsys.readouterr().out


def test_partitions_hold_all_records(wiki):
    assert run(wiki, "--file_partition", "3") == 0
    parts = sorted(output(wiki).parent.glob("wiki.mindrecord?"))
    assert len(parts) == 3
    rows = np.concatenate([records(part) for part in parts])
    ids = stream(CLEAN)
    expected = np.array(ids[: len(ids) // 17 * 17]).reshape(-1, 17)
    assert sorted(map(tuple, rows)) == sorted(map(tuple, expected))


def test_wikipedia_rows(tmp_path):
    texts = ["first <unk> text", "second = text ="] * 20
    lines = [json.dumps({"id": 3, "body": one}) for one in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    more = ("--dataset_type", "wikipedia", "--text_column", "body")
    assert run(tmp_path, *more, pattern="*.jsonl") == 0
    assert_holds(output(tmp_path), stream(texts), 16)


def test_output_is_refused_then_overwritten(wiki, capsys):
    assert run(wiki) == 0
    before = output(wiki).read_bytes()
    assert run(wiki, "--repeat", "2") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert output(wiki).read_bytes() == before
    assert run(wiki, "--repeat", "2", "--overwrite") == 0
    assert_holds(output(wiki), stream(CLEAN * 2), 16)


def bad_bytes(folder):
    (folder / "c.tokens").write_bytes(b"abc \xff def")


@pytest.mark.parametrize(
    ("more", "options", "prepare", "message"),
    [
        ((), {"pattern": "*.none"}, None, "matches no file"),
        ((), {"model": "/none/tokenizer.model"}, None, "cannot read the tokenizer model"),
        ((), {"model": str(Path(__file__))}, None, "not a sentencepiece model"),
        ((), {"seq_length": 0}, None, "--seq_length 0"),
        ((), {"seq_length": 10**9}, None, "--seq_length 1000000000"),
        ((), {"seq_length": 10**6}, None, "fewer than one record"),
        ((), {}, bad_bytes, "c.tokens: byte 0xff at offset 4"),
        (("--dataset_type", "qa2"), {}, None, "choose one of: .*wiki, wikipedia"),
        (("--repeat", "0"), {}, None, "--repeat 0"),
        (("--samples_num", "-1"), {}, None, "--samples_num -1"),
        (("--file_partition", "0"), {}, None, "--file_partition 0"),
        (("--dataset_type", "wikipedia"), {}, None, "--dataset_type wiki"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(wiki, capsys, more, options, prepare, message):
    if prepare:
        prepare(wiki)
    assert run(wiki, *more, **options) == 2
    printed = capsys.readouterr().err.strip()
    assert re.search(rf"^error: .*{message}", printed.splitlines()[-1])
    assert "Traceback" not in printed
    assert not output(wiki).parent.exists() or not list(output(wiki).parent.iterdir())


def test_empty_input_is_named(tmp_path, capsys):
    (tmp_path / "a.tokens").write_text(" \n = Only a title = \n \n")
    assert run(tmp_path) == 2
    assert "no text found in 1 file" in capsys.readouterr().err


def interrupted_import():
    """What Ctrl-C becomes while a native module is imported."""
    try:
        raise ImportError("initialization failed") from KeyboardInterrupt()
    except ImportError as error:
        return error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("bad flag"), 2, "error: bad flag"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            RuntimeError("----\n- Banner:\n[ERROR] disk full\nstack"),
            1,
            "failed: RuntimeError: [ERROR] disk full (add --debug for the traceback)",
        ),
        (SignalInterrupt(signal.SIGTERM), 143, "interrupted by SIGTERM"),
        (SignalInterrupt(signal.SIGHUP), 129, "interrupted by SIGHUP"),
        (interrupted_import(), 130, "interrupted"),
        (OSError(), 1, "failed: OSError: no message (add --debug for the traceback)"),
    ],
)
def test_exit_status_and_message_of_errors(capsys, error, status, message):
    def fail(argv):
        raise error

    assert run_command(fail, []) == status
    assert capsys.readouterr().err == f"{message}\n"
    assert run_command(fail, ["--debug"]) == status
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def killed(wiki, monkeypatch):
    """Makes the command get a signal when it has written its records."""
    real = RecordWriter.write
    folder = output(wiki).parent

    def by(number):
        def write(self, **columns):
            real(self, **columns)
            assert os.listdir(folder) == [".wiki.mindrecord.writing"]
            os.kill(os.getpid(), number)

        monkeypatch.setattr(RecordWriter, "write", write)
        return run(wiki)

    return by


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_nothing(wiki, killed, capsys, number):
    assert killed(number) == 128 + number
    assert "interrupted" in capsys.readouterr().err
    assert not output(wiki).parent.exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_nohup_has_set_stays(wiki, killed):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert killed(signal.SIGHUP) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert output(wiki).exists()


def test_a_home_is_where_it_is(wiki, monkeypatch):
    """The shell leaves --output_file=~/w as it is."""
    monkeypatch.setenv("HOME", str(wiki))
    assert run(wiki, "--output_file=~/w.mindrecord") == 0
    assert_holds(wiki / "w.mindrecord", stream(CLEAN), 16)


def test_a_second_one_at_the_same_time_is_refused(wiki, capsys):
    with RecordWriter(output(wiki)) as first:
        assert run(wiki) == run(wiki, "--overwrite") == 2
        wanted = rf"error: {output(wiki)}: wait for its writer, or .* \(process {os.getpid()} on"
        assert re.search(wanted, capsys.readouterr().err)
        first.write(input_ids=np.ones((3, 17), np.int32))
    assert_holds(output(wiki), [1] * 51, 16)


def test_an_input_is_not_replaced(wiki, capsys):
    text = (wiki / "a.tokens").read_bytes()
    for more, flag in (
        (("--output_file", str(wiki / "a.tokens")), "--input_glob"),
        (
            ("--output_file", str(wiki / "a.tokens"), "--input_glob", str(wiki / "a*")),
            "--input_glob",
        ),
        (("--output_file", MODEL), "--model_file"),
    ):
        assert run(wiki, *more, "--overwrite") == 2
        assert f"is read too ({flag} " in capsys.readouterr().err
    assert (wiki / "a.tokens").read_bytes() == text


def test_exit_status_of_success():
    assert run_command(lambda argv: None, []) == 0
    assert run_command(len, ["a", "b", "c"]) == 3
