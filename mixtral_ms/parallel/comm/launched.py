"""What a launcher tells each process that it starts; read without MindSpore."""

import os

from mixtral_ms.errors import UserError

HCCL_WAITS = {"HCCL_CONNECT_TIMEOUT": "7200", "HCCL_EXEC_TIMEOUT": "7200"}
"""Seconds that an Ascend's ranks wait for one another, to connect and in a collective, unless the
environment says others. HCCL's own, 120 and about 1800, end a run in which one rank reads its
checkpoint from a slow disk or compiles for longer than the others. 7200 is HCCL's most to connect.
"""


ROLE, PROCESSES, RANK_ID, DEVICE = "MS_ROLE", "MS_WORKER_NUM", "RANK_ID", "DEVICE_ID"
_SCHEDULER = "MS_SCHED"


def is_launched() -> bool:
    """Whether a launcher started this process, be it the only one.

    Raises:
        UserError: the environment has a part only of what a launcher sets.
    """
    role, processes = os.environ.get(ROLE), _number(PROCESSES, least=1)
    if role is not None and processes is None:
        raise _left_over(ROLE, PROCESSES)
    if role is None and processes not in (None, 1):
        raise _left_over(PROCESSES, ROLE)
    return role is not None


def started_processes() -> int:
    """How many processes the launcher started. Raises UserError as `is_launched`."""
    return (_number(PROCESSES, least=1) or 1) if is_launched() else 1


def own_rank() -> int:
    """This process's number among them. Raises UserError as `is_launched`."""
    return (_number(RANK_ID, least=0) or 0) if started_processes() > 1 else 0


def own_device() -> int | None:
    """The device that the launcher gives this process; None where it does not say."""
    return _number(DEVICE, least=0) if is_launched() else None


def is_scheduler() -> bool:
    """Whether this process is there for the others to meet, and computes nothing."""
    return is_launched() and os.environ[ROLE] == _SCHEDULER


def require_scheduler() -> None:
    """Raises UserError where several processes are not told where they meet."""
    for name in ("MS_SCHED_HOST", "MS_SCHED_PORT"):
        if not os.environ.get(name):
            raise _left_over(PROCESSES, name)


def _number(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.strip().isdecimal() or int(text) < least:
        raise UserError(
            f"the environment has {name}={text!r}, which must be a whole number of at least "
            f"{least}: unset it (unset {name}), or start this by a launcher, which sets it"
        )
    return int(text)


def _left_over(there: str, lacking: str) -> UserError:
    return UserError(
        f"the environment has {there}={os.environ[there]}, and no {lacking}: a launcher sets both, "
        f"so this is left over from another program: unset it (unset {there})"
    )
