"""The 1F1B schedule: every micro batch once, few under way, and nobody waits for ever."""

from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.parallel.pipeline_schedule import Compute, SendRecv, one_forward_one_backward

SIZES = {"stages": st.integers(1, 6), "micro_batches": st.integers(1, 9)}


def all_stages(stages, micro_batches):
    return [one_forward_one_backward(stage, stages, micro_batches) for stage in range(stages)]


@given(**SIZES)
def test_each_stage_does_each_micro_batch_once_and_holds_few(stages, micro_batches):
    for stage, actions in enumerate(all_stages(stages, micro_batches)):
        computed = [action for action in actions if isinstance(action, Compute)]
        assert len(computed) == 2 * micro_batches
        for backward in (False, True):
            order = [action.micro for action in computed if action.backward == backward]
            assert order == list(range(micro_batches))
        under_way = most = 0
        for action in computed:
            under_way += -1 if action.backward else 1
            assert under_way >= 0
            most = max(most, under_way)
        assert most == min(stages - stage, micro_batches)


@given(**SIZES)
def test_neighbours_meet_and_have_what_they_give(stages, micro_batches):
    """Runs all stages; a meeting happens when both have come to it."""
    lists = all_stages(stages, micro_batches)
    done, held = [0] * stages, [set() for _ in range(stages)]

    def current(stage):
        return lists[stage][done[stage]] if done[stage] < len(lists[stage]) else None

    def advance(stage):
        action = current(stage)
        if isinstance(action, Compute):
            needs_x = ("x", action.micro) in held[stage] or stage == 0
            needs_dy = ("dy", action.micro) in held[stage] or stage == stages - 1
            assert needs_x and (needs_dy or not action.backward)
            held[stage].add(("dx" if action.backward else "y", action.micro))
            done[stage] += 1
            return True
        if not isinstance(action, SendRecv) or action.stage < stage:
            return False
        other, theirs = action.stage, current(action.stage)
        if not isinstance(theirs, SendRecv) or theirs.stage != stage:
            return False
        assert (action.send, action.receive) == (theirs.receive, theirs.send)
        if action.send is not None:
            assert ("y", action.send) in held[stage]
            held[other].add(("x", action.send))
        if theirs.send is not None:
            assert ("dx", theirs.send) in held[other]
            held[stage].add(("dy", theirs.send))
        done[stage] += 1
        done[other] += 1
        return True

    while any(advance(stage) for stage in range(stages)):
        pass
    assert done == [len(actions) for actions in lists]


def test_the_middle_of_three_stages():
    assert one_forward_one_backward(1, 3, 2) == [
        SendRecv(0, None, 0),
        Compute(0, backward=False),
        SendRecv(2, 0, None),
        SendRecv(0, None, 1),
        Compute(1, backward=False),
        SendRecv(2, 1, 0),
        Compute(0, backward=True),
        SendRecv(0, 0, None),
        SendRecv(2, None, 1),
        Compute(1, backward=True),
        SendRecv(0, 1, None),
    ]
