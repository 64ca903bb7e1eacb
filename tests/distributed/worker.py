"""A few training steps of tiny networks on one layout, and what came out, in files.

Alone, or on each process of a job:

    python tests/distributed/worker.py OUT --steps 5 --accumulation 2
    bash scripts/msrun_launcher.sh "tests/distributed/worker.py OUT --grid dp=2" 2

Writes OUT/MODEL.rank_R.npz for each of `--models`, with the arrays losses, lm, aux, z, norms and
tokens (one value a step) and, for each step s and each parameter on the rank, `grad.s.NAME`: the
gradient that the optimizer gets, after all sums and before clipping. With `--evaluate` also eval
and held_back (loss and tokens after training) and found (what is said of broken weights).

Rows of the data depend on the step and on the number of the micro batch: number m * dp + d of one
process with accumulation dp * a is what data index d sees as its micro batch m of a. So the two
must agree.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import mindspore
import numpy as np

from mixtral_ms.config.loading.step_choices import StepChoices
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.comm.gradient_reduction import shard_groups
from mixtral_ms.parallel.comm.process_groups import connect
from mixtral_ms.parallel.grid.grid_text import parse_grid
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.evaluation import Evaluator
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.non_finite import first_non_finite
from mixtral_ms.train.step.train_step import TrainStep

_SIZES = {
    "batch_size": 2,
    "seq_length": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "n_kv_heads": 4,
    "vocab_size": 64,
    "compute_dtype": "float32",
    "pad_token_id": 0,
    "init_method_std": 0.2,
}
_EXPERTS = {"expert_num": 4, "aux_loss_factor": 0.1, "z_loss_factor": 0.01}
_CAPACITY = {**_EXPERTS, "expert_num": 8, "capacity_factor": 1.1}
MODELS = {
    "dropless": {"moe_config": _EXPERTS},
    "sdrop": {"moe_config": {**_CAPACITY, "enable_sdrop": True}},
    "kdrop": {"moe_config": {**_CAPACITY, "enable_sdrop": False}, "n_kv_heads": 2},
    "tied": {"moe_config": _EXPERTS, "tie_word_embeddings": True},
    "lora": {
        "moe_config": _EXPERTS,
        "pet_config": {"lora_rank": 4, "lora_dropout": 0.0, "target_modules": ".*|.*router.*"},
    },
}
RATE, EPS, MAX_NORM = 0.01, 1e-2, 1.0
"""A large eps: with a small one Adam turns the rounding of tiny gradients into whole steps."""


def model_config(model: str, **changes) -> MixtralConfig:
    """The configuration of one of MODELS."""
    return MixtralConfig(**{**_SIZES, **MODELS[model], **changes})


def micro_batch(config: MixtralConfig, step: int, number: int) -> Batch:
    """Rows of a micro batch of one process: padding behind, and 3 to S - 1 targets in a row."""
    generator = np.random.default_rng((step, number))
    rows, length = config.batch_size, config.seq_length
    ids = generator.integers(1, config.vocab_size, (rows, length)).astype(np.int32)
    labels = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], -100)], axis=1)
    for row in range(rows):
        supervised = int(generator.integers(3, length))
        labels[row, supervised:] = -100
        ids[row, supervised + 1 :] = config.pad_token_id
    return Batch(ids, labels)


class Rows:
    """The rows of a step as a loader."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """All of them."""
        return iter(self._batches[start_batch:])


def own_batches(config: MixtralConfig, mesh: Mesh, step: int, accumulation: int) -> list[Batch]:
    """This rank's rows and columns of a step."""
    data, parts = mesh.grid.data_parallel, mesh.grid.context_parallel
    numbers = [micro * data + mesh.data_index for micro in range(accumulation)]
    whole = [micro_batch(config, step, number) for number in numbers]
    return [one.columns(mesh.context_index, parts) for one in whole]


def found_when_broken(step_fn: TrainStep, batches: list[Batch]) -> list[str]:
    """What is said of a last layer whose outputs, then of one whose weights are not finite."""
    layer = f"model.layers.{step_fn.network.config.num_layers - 1}."
    broken = [p for p in step_fn.network.get_parameters() if p.name == layer + "ffn_norm.weight"]
    found = []
    for factor in (1e38, np.nan):
        for parameter in broken:
            parameter.set_data(parameter * factor)
        found.append(first_non_finite(step_fn, batches))
    return found


def run(
    config: MixtralConfig,
    mesh: Mesh,
    *,
    zero: bool,
    steps: int,
    accumulation: int,
    evaluate: bool,
    choices: StepChoices,
    started: Path,
    backend: str,
) -> dict:
    """Train; returns the arrays to write. The file `started` tells that a step is done."""
    network = MixtralForCausalLM(config, seed=1, mesh=mesh, backend=backend)
    names = [parameter.name for parameter in network.trainable_params()]
    shards = shard_groups(config, mesh, names) if zero else {}
    optimizer = AdamW(network.trainable_params(), eps=EPS, weight_decay=0.1, shards=shards)
    step_fn = TrainStep(network, optimizer, accumulation, MAX_NORM, choices=choices)
    arrays, update = {}, optimizer.update

    def keep_and_update(gradients: tuple, rate: float, scale: float) -> None:
        for name, gradient in zip(names, gradients, strict=True):
            arrays[f"grad.{optimizer.updates}.{name}"] = gradient.asnumpy().copy()
        update(gradients, rate, scale)
        started.touch()

    optimizer.update = keep_and_update
    results = [
        dataclasses.asdict(step_fn(own_batches(config, mesh, step, accumulation), RATE))
        for step in range(steps)
    ]
    fields = {"losses": "loss", "norms": "grad_norm", "tokens": "tokens", "load": "expert_load"}
    fields |= {"dropped": "drop_percent", "entropy": "router_entropy"}
    arrays |= {key: np.array([one[field] for one in results]) for key, field in fields.items()}
    parts = {"lm": "lm_loss", "aux": "aux_loss", "z": "z_loss"}
    arrays |= {
        key: np.array([one["parts"][part] for one in results]) for key, part in parts.items()
    }
    batches = own_batches(config, mesh, steps, accumulation)
    if evaluate:
        evaluation = Evaluator(network, Rows(batches), config.batch_size)()
        arrays |= {"eval": np.array(evaluation.loss), "held_back": np.array(evaluation.tokens)}
        arrays["found"] = np.array(found_when_broken(step_fn, batches))
    return arrays


def emulate() -> None:
    """Until this process ends, backend "ascend" and its collectives compute on this CPU."""
    from helpers.ascend_emulation import emulate_ascend  # noqa: PLC0415 - few jobs need them
    from helpers.hccl_emulation import emulate_hccl  # noqa: PLC0415
    from pytest import MonkeyPatch  # noqa: PLC0415, PT013

    patch = MonkeyPatch()
    emulate_ascend(patch)
    emulate_hccl(patch)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--grid", default="dp=1", help="as in dp=2,mp=2,ep=2,pp=2,cp=1,zero=1")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--accumulation", type=int, default=1, help="micro batches of a rank")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--models", default="dropless", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--evaluate", action="store_true", help="after training")
    parser.add_argument("--changes", default="{}", help="model_config keys, as JSON")
    parser.add_argument("--choices", default="{}", help="of StepChoices, as JSON")
    parser.add_argument("--emulate", action="store_true", help="Ascend's operators, collectives")
    options = parser.parse_args()
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    mindspore.set_device("CPU")
    grid, zero = parse_grid(options.grid)
    grid = dataclasses.replace(grid, use_seq_parallel=options.sequence_parallel)
    mesh = connect(grid)
    if options.emulate:
        emulate()
    options.out.mkdir(parents=True, exist_ok=True)
    for model in options.models.split(","):
        config = model_config(model, **json.loads(options.changes))
        arrays = run(
            config,
            mesh,
            zero=zero,
            steps=options.steps,
            accumulation=options.accumulation,
            evaluate=options.evaluate,
            choices=StepChoices(**json.loads(options.choices)),
            started=options.out / f"{model}.started",
            backend="ascend" if options.emulate else "auto",
        )
        np.savez(options.out / f"{model}.rank_{mesh.rank}.npz", **arrays)
        if mesh.rank == 0:
            print(model, "losses", arrays["losses"], "norms", arrays["norms"], flush=True)


if __name__ == "__main__":
    main()
