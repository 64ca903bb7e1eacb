"""What a checkpoint remembers of its run beside tensors: which data it saw, how it trained."""

from collections.abc import Mapping
from typing import Any

from mixtral_ms.config import RunConfig
from mixtral_ms.config.loading.resolve import dataset_of, micro_batch_size, sequences_per_step
from mixtral_ms.data.loader.record_loader import RecordLoader
from mixtral_ms.log import get_logger
from mixtral_ms.train.state.rank_agreement import configuration_facts
from mixtral_ms.train.step.lr_schedule import Schedule

_SECTIONS = ("optimizer.", "lr_schedule", "runner_wrapper.", "moe_config.")
_DTYPES = ("compute_dtype", "layernorm_compute_type", "softmax_compute_type", "rotary_dtype")
_HOW_ALONE = (
    "optimizer.type",
    "optimizer.use_fused",
    "runner_wrapper.type",
    "runner_wrapper.one_host_read",
    "runner_wrapper.working_weights",
    "moe_config.comp_comm_parallel",
    "moe_config.comp_comm_parallel_degree",
)
"""They say how a step is carried out, and not what it computes."""


def data_state(config: RunConfig, loader: RecordLoader) -> dict[str, Any]:
    """What decides which sequences and targets a step sees, and who shares them how."""
    sequences, size = sequences_per_step(config), micro_batch_size(config)
    data = config.parallel_config.data_parallel if config.use_parallel else 1
    model = config.model.model_config
    return {
        "records": loader.records,
        "fingerprint": loader.fingerprint,
        "seed": config.seed,
        "shuffle": dataset_of(config, training=True).data_loader.shuffle,
        "pad_token_id": model.pad_token_id,
        "ignore_token_id": model.ignore_token_id,
        "rows_per_step": sequences,
        "batch_size": size,
        "data_parallel": data,
        "micro_batches": sequences // (size * data),
    }


class TrainingFacts:
    """The keys that decide how the next step trains.

    Args:
        config: the run.
        total_steps: that its schedule spans.
        learning_rate: of each step, counted from 0.
    """

    def __init__(self, config: RunConfig, total_steps: int, learning_rate: Schedule) -> None:
        keys = tuple(f"model.model_config.{key}" for key in _DTYPES)
        self._keys = {
            key: value
            for key, value in configuration_facts(config).items()
            if key.startswith((*_SECTIONS, *keys)) and key not in _HOW_ALONE
        }
        self._keys["total_steps"] = total_steps
        self._learning_rate = learning_rate

    def behind(self, step: int) -> dict[str, Any]:
        """What is saved after `step` steps."""
        return {"keys": self._keys, "next_learning_rate": self._learning_rate(step)}

    def say_what_changed(self, saved: Mapping[str, Any], step: int) -> None:
        """One line where a resume trains otherwise than the run before it would have."""
        before, now = saved["keys"], self._keys
        changed = [
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        rate, would_be = self._learning_rate(step), saved["next_learning_rate"]
        if rate != would_be:
            changed.append(
                f"the learning rate of step {step + 1} is {rate:.4g} and would have been "
                f"{would_be:.4g}"
            )
        if changed:
            text = "this resume trains otherwise than the run that it takes up: %s"
            get_logger().info(text, "; ".join(changed))
