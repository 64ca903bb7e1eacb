"""The prompts that Stanford Alpaca's rows are asked with."""

from collections.abc import Mapping
from typing import Any

# The wording is part of the data: models tuned on it expect it to the letter.
_TASK = "Below is an instruction that describes a task"
_WITH_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request.\n\n"


def alpaca_prompt(instruction: str, context: str) -> str:
    """What the model is asked: the instruction, and the input when there is one."""
    with_input = f"\n\n### Input:\n{context}" if context else ""
    return (
        f"{_TASK}{_WITH_INPUT if context else ''}{_REQUEST}"
        f"### Instruction:\n{instruction}{with_input}\n\n### Response:"
    )


def read_alpaca(row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and output of a row. Raises ValueError, with the reason, where a text is missing."""
    texts = {}
    for key in ("instruction", "output"):
        value = row.get(key)
        if value is None or value == "":
            raise ValueError(f"no {key}")
        texts[key] = value
    texts["input"] = row.get("input") or ""
    for key, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"its {key} is a {type(value).__name__}, not text")
        if key != "input" and not value.strip():
            raise ValueError(f"its {key} is white space only")
    return alpaca_prompt(texts["instruction"], texts["input"]), texts["output"]
