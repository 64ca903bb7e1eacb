"""The formats of weights, each read off `config/derived/parameter_table.py`."""

from dataclasses import dataclass

from mixtral_ms.config.derived import parameter_table
from mixtral_ms.config.derived.parameter_row import OUR_FORMAT, ParameterRow, Stored


@dataclass(frozen=True)
class Entry:
    """A parameter, or several that share a tensor, and the tensor that holds them."""

    rows: tuple[ParameterRow, ...]
    """Several alternate within each expert, along the rows."""
    stored: Stored


@dataclass(frozen=True)
class Format:
    """A way to name and lay out the weights."""

    name: str
    text: str
    """What it is, for messages."""
    mindspore: bool
    """Read by MindSpore, not by PyTorch."""
    like: tuple[str, ...] = ()
    """Formats whose entry is this one's where a parameter has none for it."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What holds the parameters, in the table's order; those that it has no name for miss."""
        sharing: dict[Stored, list[ParameterRow]] = {}
        for row in parameter_table.PARAMETERS:
            if (stored := self.stored(row)) is not None:
                sharing.setdefault(stored, []).append(row)
        return tuple(Entry(tuple(rows), stored) for stored, rows in sharing.items())

    def stored(self, row: ParameterRow) -> Stored | None:
        """What holds a parameter; None where the format has no name for it."""
        return row.stored(self.name, *self.like)


OURS = Format(
    OUR_FORMAT,
    "MindSpore, stacked experts: w1 and w3 (E, F, D), w2 (E, D, F)",
    mindspore=True,
)
MINDFORMERS_OLD = Format(
    "mindformers_old",
    "MindSpore, stacked experts, names of MindFormers before routed_experts",
    mindspore=True,
    like=("ours",),
)
GMM = Format(
    "gmm",
    "MindSpore, experts for the grouped matmul: w1 and w3 (E, D, F), w2 (E, F, D)",
    mindspore=True,
    like=("ours",),
)
GMM_OLD = Format(
    "gmm_old",
    "MindSpore, experts for the grouped matmul, names of MindFormers before routed_experts",
    mindspore=True,
    like=("mindformers_old", "ours"),
)
HF = Format("hf", "Hugging Face, a tensor for every expert", mindspore=False)
HF_FUSED = Format(
    "hf_fused",
    "the parameters of transformers 5 as they are in memory: gate_up_proj (E, 2F, D)",
    mindspore=False,
    like=("hf",),
)
NATIVE = Format("native", "Mistral's own release, a tensor for every expert", mindspore=False)
NATIVE_STACKED = Format(
    "native_stacked",
    "Mistral's first release: w1, w2 and w3 (E*F, D)",
    mindspore=False,
    like=("native",),
)

FORMATS = {
    one.name: one
    for one in (OURS, MINDFORMERS_OLD, GMM, GMM_OLD, HF, HF_FUSED, NATIVE, NATIVE_STACKED)
}
WRITABLE = ("ours", "gmm", "mindformers_old", "gmm_old", "hf")
"""What a conversion can make; the others are only read."""

NOT_WEIGHTS = (
    r"(adam_[mv]|moment[12]|moments|accu_grads)\..+",
    r"global_step|epoch_num|step_num|current_step|global_batch_size|loss_scale|scale_sense|learning_rate",
    r"beta[12]_power|current_iterator_step|last_overflow_iterator_step",
    r"(.+\.)?rotary_emb\.inv_freq",
)
"""Tensors that checkpoints hold beside the weights; they are left out and counted."""
