"""What a launcher tells each process that it starts; read without MindSpore."""

import os

HCCL_WAITS = {"HCCL_CONNECT_TIMEOUT": "7200", "HCCL_EXEC_TIMEOUT": "7200"}
"""Seconds that an Ascend's ranks wait for one another, to connect and in a collective, unless the
environment says others. HCCL's own, 120 and about 1800, end a run in which one rank reads its
checkpoint from a slow disk or compiles for longer than the others. 7200 is HCCL's most to connect.
"""


def is_launched() -> bool:
    """Whether a launcher started this process, be it the only one."""
    return "MS_ROLE" in os.environ


def started_processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("MS_WORKER_NUM", "1"))


def own_rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK_ID", "0")) if started_processes() > 1 else 0
