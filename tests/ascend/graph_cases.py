"""The graphs that are compiled for Ascend: shipped YAMLs, every layout, what YAMLs can switch on.

Every rank of every case is a process of its own.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from distributed.cases import CASES
from distributed.worker import MODELS

from mixtral_ms.graphs.results import RankJob
from mixtral_ms.parallel.grid.mesh import Mesh

RESEARCH = Path(__file__).parents[2] / "research"
TINY = str(RESEARCH / "mixtral_tiny/pretrain_mixtral-tiny.yaml")
PREDICT_TINY = str(RESEARCH / "mixtral_tiny/predict_mixtral-tiny.yaml")
SEQUENCE = 80
"""No other size of a tiny network is this, so that S x S is seen for what it is."""
_SIZES = {
    "seq_length": SEQUENCE,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "n_kv_heads": 4,
    "vocab_size": 96,
    "compute_dtype": "bfloat16",
    "pad_token_id": 0,
}
PACKED = "train_dataset.input_columns=[input_ids, segment_ids]"
CAPACITY = ("moe_config.capacity_factor=1.1", "moe_config.enable_sdrop=True")


@dataclass(frozen=True)
class GraphCase:
    """One rank of a run.

    Attributes:
        job: what is compiled.
        long: whether it is left to the long tests.
    """

    job: RankJob
    long: bool = False


@dataclass(frozen=True)
class TinyRun:
    """A small training run, or with another YAML a prediction."""

    overrides: tuple[str, ...] = ()
    grid: dict = field(default_factory=dict)
    config: str = TINY

    def job(self, rank: int = 0, layers: int = 1) -> RankJob:
        """One of its ranks, with so many layers of it."""
        sizes = {f"model.model_config.{key}": value for key, value in _SIZES.items()}
        keys = {"context.device_target": "Ascend", "runner_config.batch_size": 1, **sizes}
        if self.grid:
            keys |= {"use_parallel": True}
            keys |= {f"parallel_config.{key}": value for key, value in self.grid.items()}
        texts = tuple(f"{key}={json.dumps(value)}" for key, value in keys.items())
        return RankJob(self.config, texts + self.overrides, rank, layers)


def _of_layout(name: str, model: str) -> TinyRun:
    """A layout of docs/parallel.md with one of the networks it is trained with."""
    case = CASES[name]
    grid = {
        **{key: value for key, value in vars(case.grid).items() if isinstance(value, int)},
        "micro_batch_num": case.accumulation,
    }
    pipelined = case.grid.pipeline_stage > 1
    changes = {**MODELS[model], **case.changes}
    moe = changes.pop("moe_config")
    keys = {
        "runner_config.gradient_accumulation_steps": 1 if pipelined else case.accumulation,
        "parallel.enable_parallel_optimizer": case.zero,
        **{f"moe_config.{key}": value for key, value in moe.items()},
        **{f"model.model_config.{key}": value for key, value in changes.items()},
    }
    return TinyRun(tuple(f"{key}={json.dumps(value)}" for key, value in keys.items()), grid)


_SHORT_LAYOUTS = (
    "ep 2 over tp",
    "pp 2, tied ends",
    "tp 2, tied, split embedding",
    "cp 2",
    "dp 2, tp 2, pp 2, ep 2, zero",
)
"""Every kind of group and of cut is in one of them."""


def _layouts() -> dict[str, GraphCase]:
    """First and last rank of all of them; in short runs the last rank of a few."""
    found = {}
    for name, case in CASES.items():
        last = Mesh(case.grid).world_size - 1
        for number, model in enumerate(case.models):
            for rank in (0, last):
                job = _of_layout(name, model).job(rank)
                short = name in _SHORT_LAYOUTS and number == 0 and rank == last
                found[f"{name} | {model} | rank {rank}"] = GraphCase(job, not short)
    return found


def _shipped() -> dict[str, GraphCase]:
    """Every YAML at its own widths, one layer of each stage, first and last rank."""
    found = {}
    for path in sorted(RESEARCH.glob("*/*.yaml")):
        overrides = ("context.device_target=Ascend",)
        ranks = {"8x7b": 16, "predict_mixtral-8x7b": 8}
        last = ranks.get(path.stem, ranks["8x7b"] if "8x7b" in path.stem else 1) - 1
        for rank in sorted({0, last}):
            job = RankJob(str(path), overrides, rank, layers=1)
            short = rank == last and path.stem in ("pretrain_mixtral-8x7b", "predict_mixtral-8x7b")
            found[f"{path.stem} | rank {rank}"] = GraphCase(job, not short)
    return found


def _switches() -> dict[str, GraphCase]:
    """What a YAML can switch on, on one process or the fewest that show it."""
    lora = {**MODELS["lora"]["pet_config"], "target_modules": ".*w1|.*w2|.*w3|.*wq|.*wv"}
    every_key = ("recompute_config.recompute=True", "do_eval=True", PACKED)
    pairs = {"data_parallel": 2, "expert_parallel": 2}
    samples = 'callbacks=[{"type": "SampleMonitor"}]'
    runs = {
        "recompute, packed, evaluation": TinyRun(every_key),
        "capacity, packed": TinyRun((*CAPACITY, PACKED)),
        "window": TinyRun(("model.model_config.sliding_window=24",)),
        "window, packed": TinyRun(("model.model_config.sliding_window=24", PACKED)),
        "float16, norms too": TinyRun(
            (
                "model.model_config.compute_dtype=float16",
                "model.model_config.layernorm_compute_type=float16",
            )
        ),
        "operators of single steps": TinyRun(
            tuple(f"model.model_config.use_fused_{one}=False" for one in ("rope", "swiglu"))
        ),
        "adapters of experts": TinyRun((f"model.model_config.pet_config={json.dumps(lora)}",)),
        "sample answers, jitter": TinyRun((samples, "moe_config.router_jitter=0.01")),
        "cp 2, packed": TinyRun((PACKED,), {"context_parallel": 2}),
        "cp 2, window": TinyRun(("model.model_config.sliding_window=24",), {"context_parallel": 2}),
        "ep 2, capacity, in parts": TinyRun(
            (*CAPACITY, "moe_config.comp_comm_parallel=True"), pairs
        ),
        "ep 2, capacity, select_recompute": TinyRun(
            (*CAPACITY, "recompute_config.select_recompute=True"), pairs
        ),
        "ep 2, capacity, recompute, evaluation": TinyRun((*CAPACITY, *every_key[:2]), pairs),
        "sums of gradients cut": TinyRun(
            (
                "parallel.enable_parallel_optimizer=True",
                "parallel.parallel_optimizer_config.gradient_accumulation_shard=True",
            ),
            {"data_parallel": 2},
        ),
        "run_mode eval": TinyRun(("run_mode=eval",), pairs),
        "predict": TinyRun(config=PREDICT_TINY),
        "predict, tp 2, ep 2, float16": TinyRun(
            ("weight_dtype=float16",),
            {"model_parallel": 2, "expert_parallel": 2},
            config=PREDICT_TINY,
        ),
        "predict, int8": TinyRun(("weight_dtype=int8",), config=PREDICT_TINY),
    }
    short = {"recompute, packed, evaluation", "adapters of experts", "predict, int8"}
    short |= {"ep 2, capacity, recompute, evaluation", "window", "sample answers, jitter"}
    found = {
        name: GraphCase(run.job(1 if run.grid else 0), name not in short)
        for name, run in runs.items()
    }
    # the rank before the last stage, and layers enough to see in which order they go back
    stages = TinyRun(
        (*every_key[:1], *CAPACITY, "model.model_config.num_layers=4"),
        {"data_parallel": 2, "expert_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 2},
    )
    found["pp 2, ep 2, capacity, recompute"] = GraphCase(stages.job(0, layers=2))
    return found


GRAPH_CASES = {**_switches(), **_layouts(), **_shipped()}

ALL_CASES = [
    pytest.param(name, marks=[pytest.mark.long] if case.long else [])
    for name, case in GRAPH_CASES.items()
]
"""For parametrize, as `case`."""
