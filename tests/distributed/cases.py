"""The layouts whose training is compared with one process; run it to see how equal they are.

    python tests/distributed/cases.py [NAME ...]

prints a row of a table for each layout, with the largest errors of 5 steps, relative to the largest
value of the tensor of one process.
"""

import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from helpers.distributed import Case, References, largest_errors

TOLERANCE, STEPS = 1e-5, 5
_FOUR_LAYERS = {"num_layers": 4}
_UNEVEN = {"num_layers": 3, "offset": [1, 0]}

CASES = {
    "dp 2": Case("dp=2", accumulation=2),
    "dp 4": Case("dp=4"),
    "tp 2": Case("mp=2", models=("dropless", "kdrop")),
    "tp 4": Case("mp=4"),
    "ep 2 over dp": Case("dp=2,ep=2", accumulation=2),
    "ep 2 over tp": Case("mp=2,ep=2"),
    "ep 4": Case("dp=4,ep=4"),
    "pp 2": Case("pp=2", accumulation=4),
    "pp 2, uneven": Case("pp=2", accumulation=4, changes=_UNEVEN),
    "pp 2, tied ends": Case("pp=2", models=("tied",), accumulation=4),
    "pp 4": Case("pp=4", accumulation=4, changes=_FOUR_LAYERS),
    "dp 2, zero": Case("dp=2,zero=1", accumulation=2),
    "dp 4, zero": Case("dp=4,zero=1"),
    "tp 2, sequence parallel": Case("mp=2", sequence_parallel=True),
    "tp 2, tied, split embedding": Case("mp=2,vocab_emb_dp=0", models=("dropless", "tied")),
    "cp 2": Case("cp=2"),
    "dp 2, tp 2": Case("dp=2,mp=2", accumulation=2),
    "dp 2, ep 2, tp 2": Case("dp=2,mp=2,ep=2", accumulation=2),
    "dp 2, tp 2, adapters": Case("dp=2,mp=2", models=("lora",), accumulation=2),
    "tp 2, pp 2": Case("mp=2,pp=2", accumulation=4),
    "dp 2, tp 2, pp 2, ep 2, zero": Case("dp=2,mp=2,pp=2,ep=2,zero=1", accumulation=2),
}


def main(names: list[str]) -> None:
    """Print the table."""
    print("| layout | processes | network | loss | norm | gradients |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        references = References(Path(folder) / "references")
        for name in names or CASES:
            case, out = CASES[name], Path(folder) / name.replace(" ", "_")
            for model, errors in largest_errors(case, out, references, STEPS).items():
                cells = [f"{errors[kind][0]:.0e}" for kind in ("loss", "norm", "gradient")]
                print("|", " | ".join([name, str(case.processes), model, *cells]), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
