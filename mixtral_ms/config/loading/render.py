"""A configuration written back as YAML."""

import dataclasses
from typing import Any

import yaml

from mixtral_ms.config.sections.fields import INERT, UNSUPPORTED
from mixtral_ms.config.sections.run_section import RunConfig


def render_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads to an equal `RunConfig`.

    Keys without effect here are left out where they hold their default.
    """
    data = _plain(config)
    # what is the same object in two places is written once
    del data["model"]["model_config"]["moe_config"]
    for name in ("train_dataset_task", "eval_dataset_task"):
        if data[name] is not None:
            del data[name]["dataset_config"]
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    if "\x85" in text:  # PyYAML writes this line break so that it reads it back as a space
        text = yaml.safe_dump(data, sort_keys=False, width=100)
    return text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != field.default or not _without_effect(field)
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, dict) else value


def _without_effect(field: dataclasses.Field) -> bool:
    return INERT in field.metadata or UNSUPPORTED in field.metadata
