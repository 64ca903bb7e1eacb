"""The graphs of a run on one rank, in the order in which the run compiles them."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

from mixtral_ms.config import RunConfig
from mixtral_ms.config.derived.pipeline_stages import layers_per_stage
from mixtral_ms.config.derived.prediction import prediction_batch
from mixtral_ms.config.loading.resolve import (
    effective_parallel,
    micro_batch_size,
)
from mixtral_ms.config.sections.data_section import DatasetSection
from mixtral_ms.config.sections.training_section import SampleMonitorSection
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.data.mindrecord.reader import MindRecords
from mixtral_ms.infer.runners.infer_weights import empty_weights
from mixtral_ms.infer.runners.paged_runner import PagedRunner
from mixtral_ms.infer.runners.select_runner import select_runner
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.builders import (
    build_network,
    build_optimizer,
    build_train_step,
    callback,
    without_adapters,
)
from mixtral_ms.train.evaluation import Evaluator
from mixtral_ms.train.sample_answers import NextToken


@dataclass(frozen=True)
class RunGraph:
    """One graph, with inputs of the shapes that it will get.

    Attributes:
        name: what it computes.
        runs: how often a training step runs it; 0 outside of steps.
    """

    name: str
    cell: nn.Cell
    inputs: Sequence[Tensor | None]
    runs: int = 0


def with_layers(config: RunConfig, layers: int | None) -> RunConfig:
    """The same run with at most so many decoder layers on each pipeline stage; None keeps all."""
    model, stages = config.model.model_config, effective_parallel(config).pipeline_stage
    if layers is None or layers >= max(layers_per_stage(model, stages)):
        return config
    fewer = dataclasses.replace(model, num_layers=layers * stages, offset=0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, model_config=fewer))


def graphs_of(config: RunConfig, mesh: Mesh) -> list[RunGraph]:
    """All graphs of `run_mode`; parameters are made as zeros.

    Args:
        config: the run, its device an Ascend.
        mesh: the rank.
    """
    if config.mode.answers:
        return list(_predicting(config, mesh))
    if config.mode.trains:
        return list(_training(config, mesh))
    network = build_network(without_adapters(config), mesh, values="none")
    return [_evaluation(config, network)]


def _training(config: RunConfig, mesh: Mesh) -> Iterator[RunGraph]:
    network = build_network(config, mesh, values="none")
    step = build_train_step(config, network, build_optimizer(config, network))
    if (samples := callback(config, SampleMonitorSection)) and not _split(mesh):
        ids_NS = np.zeros((samples.rows, network.config.seq_length), np.int32)
        last_N = np.zeros(samples.rows, np.int32)
        cell = NextToken(network, samples.rows)
        yield RunGraph("sample answers", cell, (Tensor(ids_NS), Tensor(last_N)))
    batch = _batch(config, config.train_dataset, mesh, micro_batch_size(config))
    graphs = step.graphs(batch)
    for place, (cell, inputs) in enumerate(graphs.items()):
        name = "forward" if place else "forward and backward"
        yield RunGraph(name, cell, inputs, runs=step.accumulation)
    if config.do_eval:
        yield _evaluation(config, network)


def _split(mesh: Mesh) -> bool:
    """Whether a rank has but a part of the network: such a run takes no samples."""
    grid = mesh.grid
    return grid.model_parallel * grid.pipeline_stage * grid.context_parallel > 1


def _evaluation(config: RunConfig, network: MixtralForCausalLM) -> RunGraph:
    section = config.eval_dataset
    rows = (section and section.batch_size) or micro_batch_size(config)
    batch = _batch(config, section, network.mesh, rows)
    ((cell, inputs),) = Evaluator(network, _NoData(), rows).graphs(batch).items()
    return RunGraph("evaluation", cell, inputs)


def _predicting(config: RunConfig, mesh: Mesh) -> Iterator[RunGraph]:
    """Of the shapes that prediction rounds to the largest of each kind."""
    model = config.model.model_config
    weights = empty_weights(model, config.weight_dtype, mesh)
    runner = select_runner(
        model, weights, backend="graph", mesh=mesh, batch=prediction_batch(config)
    )
    if not isinstance(runner, PagedRunner):
        raise RuntimeError("these are no graphs of an Ascend device")
    for name, (cell, inputs) in runner.graphs().items():
        yield RunGraph(name, cell, inputs)


class _NoData:
    def __len__(self) -> int:
        return 0

    def batches(
        self,
        epoch: int,  # noqa: ARG002
        start_batch: int = 0,  # noqa: ARG002
    ) -> Generator[Batch, None, None]:
        """None."""
        yield from ()


def _batch(config: RunConfig, section: DatasetSection | None, mesh: Mesh, rows: int) -> Batch:
    """This rank's part of a batch of a data set."""
    ids_BS = np.zeros((rows, config.model.model_config.seq_length), np.int32)
    segments = ids_BS if section is not None and _is_packed(section) else None
    return Batch(ids_BS, ids_BS, segments).columns(mesh.context_index, mesh.grid.context_parallel)


def _is_packed(section: DatasetSection) -> bool:
    """Whether records hold several samples: as the loader finds, by the files if they are there."""
    loader = section.data_loader
    if loader.type == "ConversationDataset":
        return loader.packing
    columns = section.input_columns
    if loader.dataset_dir and Path(loader.dataset_dir).exists():
        columns = MindRecords(loader.dataset_dir, columns).columns
    return "segment_ids" in columns
