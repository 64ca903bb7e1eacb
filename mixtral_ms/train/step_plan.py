"""Where a run stands in its data: a pure function of the step, so a resume needs only that."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

from mixtral_ms.config.loading.resolve import pipeline_micro_batches
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.config.sections.training_section import RunnerConfig
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.errors import UserError


class Loader(Protocol):
    """What training needs of a data loader."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def batches(self, epoch: int, start_batch: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch from one on."""


@dataclass(frozen=True)
class StepPlan:
    """How many steps, and which micro batches each takes.

    Attributes:
        steps_per_epoch: optimizer steps in one pass over the data.
        accumulation: micro batches of a rank in a step, those in the pipeline included.
        total_steps: steps of the whole run, which the schedule spans.
        last_step: where this process stops; total_steps, or earlier.
    """

    steps_per_epoch: int
    accumulation: int
    total_steps: int
    last_step: int

    def epoch_of(self, step: int) -> int:
        """Epoch, from 0, of the step after `step` steps are done."""
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch is complete after `step` steps."""
        return step % self.steps_per_epoch == 0

    def micro_batches(self, loader: Loader, step: int) -> Iterator[list[Batch]]:
        """The micro batches of each step from `step` on, epoch after epoch."""
        while True:
            start = step % self.steps_per_epoch * self.accumulation
            batches = loader.batches(self.epoch_of(step), start)
            for _ in range(self.steps_per_epoch - step % self.steps_per_epoch):
                yield [next(batches) for _ in range(self.accumulation)]
                step += 1
            batches.close()


def plan_steps(
    runner: RunnerConfig, batches_per_epoch: int, data_path: str, grid: ParallelConfig
) -> StepPlan:
    """The plan of a run over a loader's batches.

    Raises:
        UserError: the data does not fill one step.
    """
    accumulation = runner.gradient_accumulation_steps * pipeline_micro_batches(grid)
    steps_per_epoch = batches_per_epoch // accumulation
    if steps_per_epoch == 0:
        several = f" on each of {grid.data_parallel} ranks" if grid.data_parallel > 1 else ""
        pipelined = grid.pipeline_stage > 1
        times = f" * micro_batch_num {grid.micro_batch_num}" if pipelined else ""
        raise UserError(
            f"{data_path} fills {batches_per_epoch} micro batches of "
            f"runner_config.batch_size {runner.batch_size}{several}, but one step takes "
            f"gradient_accumulation_steps {runner.gradient_accumulation_steps}{times}: use more "
            "data or smaller steps"
        )
    total = runner.max_steps or runner.epochs * steps_per_epoch
    last = min(total, runner.stop_at_step or total)
    return StepPlan(steps_per_epoch, accumulation, total, last)
