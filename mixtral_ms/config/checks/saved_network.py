"""A network's configuration out of a record of ours, checked as a YAML's is."""

from collections.abc import Mapping
from typing import Any

from mixtral_ms.config.checks.check_model import network_problems
from mixtral_ms.config.loading.section_builder import SectionBuilder
from mixtral_ms.config.loading.yaml_tree import from_python
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.errors import UserError

NETWORK_KEY = "model_config"
"""In state.json and in a conversion's record."""


def saved_network(record: Mapping[str, Any], where: object) -> MixtralConfig | None:
    """The network that a record says its weights are of; None where it says none.

    Args:
        record: the JSON object.
        where: its file.

    Raises:
        UserError: a key is unknown or holds what it cannot: damage, or another version's.
    """
    if NETWORK_KEY not in record:
        return None
    builder = SectionBuilder(MixtralConfig)
    network = builder.section(MixtralConfig, from_python(record[NETWORK_KEY], str(where)))
    if network is None or builder.errors:
        raise UserError(
            f"{where}: its {NETWORK_KEY} is damaged, or of another version of mixtral-ms: "
            f"{'; '.join(builder.errors)}"
        )
    if problems := network_problems(network):
        raise UserError(f"{where}: {'; '.join(problems)}")
    return network
