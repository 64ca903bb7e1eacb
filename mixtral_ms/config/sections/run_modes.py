"""What each run_mode does, reads and needs. Whoever treats modes differently asks a row of this."""

from dataclasses import dataclass
from typing import Literal

RunModeName = Literal["train", "finetune", "eval", "predict"]


@dataclass(frozen=True)
class RunMode:
    """One run_mode."""

    action: Literal["train", "evaluate", "predict"]
    """The Trainer's method."""
    datasets: tuple[str, ...] = ()
    """Sections whose records it reads; with do_eval a mode that trains reads eval_dataset too."""
    needs_weights: bool = False
    """Whether it is refused without load_checkpoint. A run that is resumed has its own."""

    @property
    def trains(self) -> bool:
        """Whether there are gradients, an optimizer and checkpoints."""
        return self.action == "train"

    @property
    def answers(self) -> bool:
        """Whether it reads and writes text: with a tokenizer, and a cache in place of labels."""
        return self.action == "predict"


RUN_MODES: dict[RunModeName, RunMode] = {
    "train": RunMode("train", ("train_dataset",)),
    "finetune": RunMode("train", ("train_dataset",), needs_weights=True),
    "eval": RunMode("evaluate", ("eval_dataset",), needs_weights=True),
    "predict": RunMode("predict", needs_weights=True),
}
