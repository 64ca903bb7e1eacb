"""From YAML text and overrides to a RunConfig."""
