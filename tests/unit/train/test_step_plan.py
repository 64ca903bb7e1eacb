"""Which micro batches a step takes depends on the step alone."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.config.sections.training_section import RunnerConfig
from mixtral_ms.errors import UserError
from mixtral_ms.train.step_plan import plan_steps


class CountingLoader:
    """A loader whose batches are their own (epoch, number)."""

    def __init__(self, batches):
        self.count = batches

    def __len__(self):
        return self.count

    def batches(self, epoch, start_batch=0):
        yield from ((epoch, number) for number in range(start_batch, self.count))


def plan_of(batches, **keys):
    runner = RunnerConfig(**{"batch_size": 4, **keys})
    return plan_steps(runner, batches, "data", ParallelConfig())


def steps_from(plan, loader, step, count):
    return list(islice(plan.micro_batches(loader, step), count))


@given(
    batches=st.integers(1, 12),
    accumulation=st.integers(1, 4),
    epochs=st.integers(1, 4),
    data=st.data(),
)
def test_a_resumed_plan_continues_where_the_whole_one_would_be(batches, accumulation, epochs, data):
    accumulation = min(accumulation, batches)
    plan = plan_of(batches, gradient_accumulation_steps=accumulation, epochs=epochs)
    loader = CountingLoader(batches)
    whole = steps_from(plan, loader, 0, plan.total_steps)
    step = data.draw(st.integers(0, plan.total_steps))
    assert steps_from(plan, loader, step, plan.total_steps - step) == whole[step:]


@given(batches=st.integers(1, 12), accumulation=st.integers(1, 4), epochs=st.integers(1, 3))
def test_an_epoch_takes_each_batch_once_in_order(batches, accumulation, epochs):
    accumulation = min(accumulation, batches)
    plan = plan_of(batches, gradient_accumulation_steps=accumulation, epochs=epochs)
    steps = steps_from(plan, CountingLoader(batches), 0, plan.total_steps)
    taken = [batch for step in steps for batch in step]
    used = batches // accumulation * accumulation
    assert taken == [(epoch, number) for epoch in range(epochs) for number in range(used)]
    assert all(len(step) == accumulation for step in steps)


def test_epochs_count_from_the_steps_done():
    plan = plan_of(7, gradient_accumulation_steps=2, epochs=2)
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 6)
    assert [plan.epoch_of(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert [step for step in range(1, 7) if plan.ends_epoch(step)] == [3, 6]


def test_max_steps_wins_over_epochs_and_goes_round_the_data():
    plan = plan_of(2, epochs=1, max_steps=5)
    assert (plan.total_steps, plan.last_step) == (5, 5)
    steps = steps_from(plan, CountingLoader(2), 0, 5)
    assert steps == [[(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)], [(2, 0)]]


@pytest.mark.parametrize(("stop", "last"), [(None, 6), (4, 4), (6, 6), (9, 6)])
def test_stop_at_step_ends_the_process_but_not_the_run(stop, last):
    plan = plan_of(3, epochs=2, stop_at_step=stop)
    assert (plan.total_steps, plan.last_step) == (6, last)


def test_data_that_does_not_fill_a_step_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"fills 3 micro batches .*accumulation_steps 4"):
        plan_of(3, gradient_accumulation_steps=4)
