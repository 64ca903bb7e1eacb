"""What a line that begins with / does in a chat."""

import ast
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mixtral_ms.cli.support.chat_session import ChatSession
from mixtral_ms.config.loading.section_builder import nearest
from mixtral_ms.errors import UserError

HELP = """\
  /help            this list
  /system TEXT     what the model is told before the first question; alone: forget it
  /history         what was said
  /reset           forget what was said
  /set KEY=VALUE   for example temperature=0.7; alone: how answers are generated
  /save FILE       write the conversation as JSON
  /load FILE       take a saved conversation
  /exit            leave, as Ctrl-D
  //text           say "/text" """.rstrip()
_WORDS = {"true": True, "false": False, "none": None}


def run_chat_command(session: ChatSession, line: str) -> bool:
    """Do what a line says; returns False when it ends the chat.

    Raises:
        UserError: there is no such command, or it cannot be done.
    """
    name, _, argument = line.strip().partition(" ")
    if name in ("/exit", "/quit"):
        return False
    if name not in _COMMANDS:
        close = nearest(name, _COMMANDS)
        raise UserError(f"no command {name}: {f'did you mean {close}?' if close else 'see /help'}")
    said = _COMMANDS[name](session, argument.strip())
    if said:
        print(said, flush=True)
    return True


def _help(session: ChatSession, argument: str) -> str:
    return HELP


def _reset(session: ChatSession, argument: str) -> str:
    session.reset()
    return "(forgotten)"


def _system(session: ChatSession, argument: str) -> str:
    session.history.system = argument
    return "(the model is told so)" if argument else "(no system text)"


def _history(session: ChatSession, argument: str) -> str:
    messages = session.history.messages
    return "\n".join(f"{one['role']}: {one['content']}" for one in messages) or "(nothing yet)"


def _save(session: ChatSession, argument: str) -> str:
    path = _path(argument, "/save")
    session.history.save(path)
    return f"(saved: {path}; /load {path} goes on with it)"


def _load(session: ChatSession, argument: str) -> str:
    path = _path(argument, "/load")
    session.history.load(path)
    return f"({len(session.history.turns)} turns)"


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise UserError(f"{command}: name a file")
    return Path(argument).expanduser()


def _set(session: ChatSession, argument: str) -> str:
    known = [one.name for one in fields(session.params)]
    if not argument:
        return "\n".join(f"  {name}={getattr(session.params, name)!r}" for name in known)
    name, equals, text = argument.partition("=")
    name = name.strip()
    if not equals or name not in known:
        raise UserError(f"/set {argument}: write /set KEY=VALUE; keys are {', '.join(known)}")
    session.params = replace(session.params, **{name: _value(text.strip())})
    return f"({name} is {getattr(session.params, name)!r})"


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


_COMMANDS: dict[str, Callable[[ChatSession, str], str]] = {
    "/help": _help,
    "/reset": _reset,
    "/system": _system,
    "/history": _history,
    "/save": _save,
    "/load": _load,
    "/set": _set,
}
