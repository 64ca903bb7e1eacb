"""The order of work on a pipeline stage: 1F1B (section 2.2 of arXiv 2104.04473).

After as many forwards as there are stages behind it, a stage does one forward and one backward in
turn, so that it holds the inputs of at most `stages - stage` micro batches.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Compute:
    """Run a micro batch through the stage."""

    micro: int
    backward: bool


@dataclass(frozen=True)
class SendRecv:
    """Send to and receive from a neighbour, at the same point of its own list of actions.

    To the stage behind go activations, to the one before go their gradients.
    """

    stage: int
    send: int | None
    """Micro batch whose activation or gradient is sent."""
    receive: int | None
    """Micro batch whose gradient or activation is received."""


def one_forward_one_backward(
    stage: int, stages: int, micro_batches: int
) -> list[Compute | SendRecv]:
    """What one stage does in a step, in order."""
    warm_up = min(stages - 1 - stage, micro_batches)
    before = stage - 1 if stage > 0 else None
    behind = stage + 1 if stage < stages - 1 else None
    actions: list[Compute | SendRecv] = []

    def send_recv(
        other: int | None, *, send: int | None = None, receive: int | None = None
    ) -> None:
        if other is not None and (send is not None or receive is not None):
            actions.append(SendRecv(other, send, receive))

    for micro in range(warm_up):
        send_recv(before, receive=micro)
        actions.append(Compute(micro, backward=False))
        send_recv(behind, send=micro)
    if warm_up < micro_batches:
        send_recv(before, receive=warm_up)
    for micro in range(warm_up, micro_batches):
        oldest, following = micro - warm_up, micro + 1
        actions.append(Compute(micro, backward=False))
        send_recv(behind, send=micro, receive=oldest)
        actions.append(Compute(oldest, backward=True))
        send_recv(before, send=oldest, receive=following if following < micro_batches else None)
    for micro in range(micro_batches - warm_up, micro_batches):
        send_recv(behind, receive=micro)
        actions.append(Compute(micro, backward=True))
        send_recv(before, send=micro)
    return actions
