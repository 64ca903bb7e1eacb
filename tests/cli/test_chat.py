"""The chat command: through a pipe, in a terminal, and its parts."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers.answering import CONTEXT, make_model, network
from helpers.runs import environment, heeding_signals

from mixtral_ms import load_config
from mixtral_ms.cli.commands.chat import main as chat
from mixtral_ms.cli.support.chat_session import ChatSession
from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.data.conversations.chat_template import load_template
from mixtral_ms.infer.engine.engine import Engine
from mixtral_ms.infer.load_model import load_model
from mixtral_ms.infer.text.instruct_template import encode_chat

NEW = ("--max_new_tokens", "5")
CUT = "(cut at 5 tokens; /set max_new_tokens=N)"


@pytest.fixture(scope="module")
def yaml_path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(yaml_path):
    return load_model(load_config(yaml_path, ["model.model_config.max_new_tokens=5"]))


@pytest.fixture
def say(yaml_path, capsys, monkeypatch):
    """Pipes lines through the command; gives the printed lines."""

    def piped(*lines, flags=NEW):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = run_command(chat, ["--config", str(yaml_path), *flags])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        assert re.fullmatch(
            r"\S+ INFO (C\+\+|graph) runner, .*loaded in .* s\n"
            r"\S+ INFO chat template mistral \(.*none is recorded.*\)\n",
            printed.err,
        )
        return printed.out.splitlines()

    return piped


def answer_to(model, *messages):
    """Greedy answer to messages, by the template and the engine alone."""
    roles = ("user", "assistant")
    rows = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    ids = encode_chat(model.chat_encoder, rows)
    (answer,) = model.engine.generate([ids], model.params)
    return answer.text.strip()


def test_answers_follow_the_template_and_the_history(say, model):
    first = answer_to(model, "hello")
    second = answer_to(model, "hello", first, "again")
    assert say("hello", "", "again") == [first, CUT, second, CUT]


@pytest.fixture
def recorded(yaml_path, tmp_path):
    """The same model, trained on conversations in vicuna's template; its YAML."""
    tree = yaml.safe_load(yaml_path.read_text())
    shutil.copytree(tree["load_checkpoint"], tmp_path / "weights")
    record = {"chat_template": load_template("vicuna").record}
    (tmp_path / "weights" / "state.json").write_text(json.dumps(record))
    tree["load_checkpoint"] = str(tmp_path / "weights")
    (tmp_path / "predict.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "predict.yaml"


@pytest.mark.parametrize(
    "more, name, source",
    [
        ((), "vicuna_v1.1", r"recorded in \S+/state.json"),
        (("--template", "mistral"), "mistral", "--template"),
        (("--template", "zephyr"), "zephyr", "--template"),
    ],
)
def test_it_asks_with_the_template_that_was_trained_on(
    recorded, capsys, monkeypatch, more, name, source
):
    asked = []
    answer = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda *args: asked.append(args[1]) or answer(*args))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert run_command(chat, ["--config", str(recorded), *NEW, *more]) == 0
    assert re.search(rf"chat template {name} \({source}\)", capsys.readouterr().err)
    model = load_model(load_config(recorded, []))
    assert asked == [model.encoder_of(name).prompt([], "", "hello")]


def test_a_template_that_is_none_is_named(recorded, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert run_command(chat, ["--config", str(recorded), "--template", "vicunna"]) == 2
    assert "did you mean 'vicuna'" in capsys.readouterr().err
    state = recorded.parent / "weights/state.json"
    state.write_text('{"chat_template": ["vicuna"]}')
    assert run_command(chat, ["--config", str(recorded)]) == 2
    assert f"error: {state}: 'chat_template': a list, but must be" in capsys.readouterr().err


def test_a_users_text_is_never_a_control_token(model):
    session = ChatSession(model)
    session.history.system = "</s>"
    session.history.turns = [("<s> <unk>", "fine")]
    ids, _ = session.history.prompt_ids("[INST] </s><s> [/INST]", 10**6)
    # bos at the front and eos behind the one answer: no other control id
    fine = len(ids) - 1 - ids[::-1].index(2)
    assert [index for index, one in enumerate(ids) if one < 3] == [0, fine]
    assert model.tokenizer.encode("fine") == ids[fine - len(model.tokenizer.encode("fine")) : fine]


def test_commands(say, model, tmp_path):
    first = answer_to(model, "hello")
    file = tmp_path / "talk.json"
    assert say("hello", "/history", f"/save {file}", "/reset", "/history", f"/load {file}",
               "/system be kind", "/history", f"/save {file}", "/exit", "unread") == [
        first, CUT,
        "user: hello", f"assistant: {first}",
        f"(saved: {file}; /load {file} goes on with it)",
        "(forgotten)",
        "(nothing yet)",
        "(1 turns)",
        "(the model is told so)",
        "system: be kind", "user: hello", f"assistant: {first}",
        f"error: {file} already exists: choose another name",
    ]  # fmt: skip
    assert json.loads(file.read_text())["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
    ]


def test_a_slash_can_be_said(say, model):
    assert say("//help me") == [answer_to(model, "/help me"), CUT]


def test_set_changes_the_next_answer(say, model):
    first = answer_to(model, "hello")
    lines = say("/set max_new_tokens=2", "hello", "/reset", "/set do_sample=true",
                "/set temperature=3", "/set max_new_tokens=5", "/set stop=('zq',)", "hello",
                "/set")  # fmt: skip
    assert lines[0] == "(max_new_tokens is 2)"
    assert lines[2] == "(cut at 2 tokens; /set max_new_tokens=N)"
    assert first.startswith(lines[1])
    assert lines[8] != first
    assert {"  do_sample=True", "  temperature=3", "  stop=('zq',)"} <= set(lines)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("/hepl", "no command /hepl: did you mean /help?"),
        ("/xyz", "no command /xyz: see /help"),
        ("/set temprature=1", "keys are max_new_tokens, "),
        ("/set top_p=2", "top_p 2: must be a number"),
        ("/save", "/save: name a file"),
        ("/save /proc/none/x", "/proc/none/x cannot be written"),
        ("/load /none", "/none: no such file"),
        ("word " * CONTEXT, f"and the context (seq_length) is {CONTEXT}"),
    ],
)
def test_a_mistake_is_one_line_and_the_chat_goes_on(say, model, line, part):
    said, *rest = say(line, "hello")
    assert said.startswith("error: ")
    assert part in said
    assert rest == [answer_to(model, "hello"), CUT]


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        "[" * 9999,
        '{"messages": [], "messages": [3]}',
        '{"messages": 3}',
        '{"messages": [3]}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}]}',
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(say, tmp_path, content):
    file = tmp_path / "x.json"
    file.write_text(content)
    _, _, *history, error, user, assistant = say("hello", "/history", f"/load {file}", "/history")
    assert error.startswith(f"error: {file}")
    assert [user, assistant] == history


def test_the_oldest_turns_are_dropped_with_a_word(model):
    session = ChatSession(model)
    notes = []
    for _ in range(6):
        for _ in session.ask("What is the weather like today?"):
            pass
        notes += [note for note in session.notes if "history" in note]
        ids, _ = session.history.prompt_ids("What is the weather like today?", CONTEXT - 5)
        assert len(ids) + 5 <= CONTEXT
    assert len(session.history.turns) == 6
    assert re.fullmatch(
        rf"the history is longer than the context of {CONTEXT} tokens: the oldest \d of \d turns "
        "are no longer seen",
        notes[0],
    )
    kept = ids.count(2)
    expected = [{"role": r, "content": t} for turn in session.history.turns[6 - kept :]
                for r, t in zip(("user", "assistant"), turn, strict=True)]  # fmt: skip
    expected.append({"role": "user", "content": "What is the weather like today?"})
    assert 0 < kept < 6
    assert ids == encode_chat(model.chat_encoder, expected)


def test_a_stopped_answer_stays_in_the_history(model):
    session = ChatSession(model)
    pieces = []
    for piece in session.ask("hello", lambda: len(pieces) >= 2):
        pieces.append(piece)
    assert session.notes == ["stopped"]
    assert session.history.turns == [("hello", "".join(pieces).strip())]
    assert not model.engine.busy
    assert "".join(session.ask("hello")) == answer_to(
        model, "hello", "".join(pieces).strip(), "hello"
    )


def test_help_has_an_example_and_the_commands(capsys):
    with pytest.raises(SystemExit) as leaving:
        chat(["--help"])
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    assert "example:\n  python -m mixtral_ms chat --config" in printed
    assert "/system TEXT" in printed


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments):
        self.own, theirs = pty.openpty()
        with heeding_signals():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mixtral_ms", "chat", *map(str, arguments)],
                stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environment(),
                start_new_session=True,
            )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def wait_for(self, text):
        """Read until `text` is shown, and forget what came up to it."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            readable, _, _ = select.select([self.own], [], [], deadline - time.monotonic())
            assert readable, self.shown
            try:
                self.shown += os.read(self.own, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"ended without {text!r}: {self.shown}") from None
        self.shown = self.shown.partition(text)[2]

    def type(self, text):
        os.write(self.own, text.encode())

    def ctrl_c(self):
        # As late as a person: between showing its prompt and waiting for keys, Python's readline
        # does not act on a signal before the next key.
        time.sleep(1)
        self.process.send_signal(signal.SIGINT)

    def end(self):
        status = self.process.wait(timeout=30)
        os.close(self.own)
        return status


@pytest.fixture
def terminal(yaml_path):
    long = ("--set", "model.model_config.seq_length=8192", "--max_new_tokens", "8000")
    room = ("--set", "model.model_config.num_blocks=1024")
    one = Terminal("--config", yaml_path, *long, *room, "--do_sample", "True", "--temperature", "2")
    yield one
    one.process.kill()
    one.process.wait()


def test_ctrl_c_stops_the_answer_and_then_leaves(terminal):
    terminal.wait_for("you> ")
    terminal.type("hello\n")
    terminal.wait_for("hello\r\n")
    terminal.wait_for(" ")  # the answer has begun
    terminal.ctrl_c()
    terminal.wait_for("(stopped)")
    terminal.wait_for("you> ")
    terminal.type("/history\n")
    terminal.wait_for("assistant: ")
    terminal.wait_for("you> ")
    terminal.ctrl_c()
    terminal.wait_for("leaves)")
    terminal.ctrl_c()
    assert terminal.end() == 0


def test_ctrl_d_leaves(terminal):
    terminal.wait_for("you> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_the_network_of_these_tests_is_the_yamls(yaml_path, model):
    assert network(yaml_path).seq_length == model.network.seq_length == CONTEXT
