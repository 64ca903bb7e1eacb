"""The sections of the YAML as dataclasses: the full list of keys."""
