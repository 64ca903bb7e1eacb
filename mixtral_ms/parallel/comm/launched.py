"""What a launcher tells each process that it starts; read without MindSpore."""

import os


def is_launched() -> bool:
    """Whether a launcher started this process, be it the only one."""
    return "MS_ROLE" in os.environ


def started_processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("MS_WORKER_NUM", "1"))


def own_rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK_ID", "0")) if started_processes() > 1 else 0
