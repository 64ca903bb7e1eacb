"""How answers are generated, beyond MindFormers' keys in model_config; and where they go."""

from dataclasses import dataclass, field


@dataclass
class GenerationSection:
    """`generation`."""

    min_p: float = 0.0
    """With do_sample: draw from tokens at least this share as likely as the likeliest."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the answer already has."""
    stop: list[str] = field(default_factory=list)
    """The answer ends before the first of these texts."""
    num_beams: int = 1
    """Hypotheses of a beam search; 1 means none."""
    logprobs: bool = False
    """Give the log-probability of each token of the answer."""
    output_file: str | None = None
    """Answers as JSON lines, one a prompt, in order."""
    overwrite: bool = False
    """Replace an existing output_file."""
