"""Time and memory of imports, each in a process of its own.

    .venv-mindformers/bin/python benchmarks/import_time.py

Prints for each statement the median of the CPU seconds, user and system, and of the peak memory.
"""

import argparse
import statistics
import subprocess
import sys

STATEMENTS = (
    "import mixtral_ms",
    "import mindspore",
    "from mixtral_ms import Trainer",
    "import mindformers",
    "import mixtral_ms.integrations.mindformers",
)
MEASURED = """
import resource
{statement}
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""


def measure(statement, runs):
    results = []
    for _ in range(runs + 1):  # the first one warms the disk's cache
        done = subprocess.run(
            [sys.executable, "-c", MEASURED.format(statement=statement)],
            capture_output=True,
            text=True,
            check=True,
        )
        results.append([float(value) for value in done.stdout.splitlines()[-1].split()])
    return [statistics.median(column) for column in zip(*results[1:], strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    print("| statement | CPU seconds | peak MB |\n|---|---|---|")
    for statement in STATEMENTS:
        seconds, megabytes = measure(statement, runs)
        print(f"| `{statement}` | {seconds:.2f} | {megabytes:.0f} |")


if __name__ == "__main__":
    main()
