"""Flags that say how answers are generated: of `run --run_mode predict`, `complete` and `chat`."""

from mixtral_ms.cli.support.flags import Flag, flag

_MODEL = "model.model_config."
_OWN = "generation."

GENERATION_FLAGS: tuple[Flag, ...] = (
    flag("do_sample", _MODEL + "do_sample", bool, "draw each token; False takes the likeliest"),
    flag("max_new_tokens", _MODEL + "max_new_tokens", int, "longest answer"),
    flag("temperature", _MODEL + "temperature", float, "below 1 is safer, above 1 wilder"),
    flag("top_k", _MODEL + "top_k", int, "draw among so many tokens; 0 means all"),
    flag("top_p", _MODEL + "top_p", float, "draw among tokens of this probability together"),
    flag("min_p", _OWN + "min_p", float, "draw among tokens of this share of the likeliest's"),
    flag("repetition_penalty", _MODEL + "repetition_penalty", float, "above 1: repeat less"),
    flag("presence_penalty", _OWN + "presence_penalty", float, "above 0: repeat less"),
    flag("stop", _OWN + "stop", str, "end the answer before this text", repeated=True),
    flag("num_beams", _OWN + "num_beams", int, "hypotheses of a beam search (1)"),
    flag(
        "weight_dtype",
        "weight_dtype",
        str,
        "format of the weights in prediction; eval says what it costs",
        choices=("float32", "float16", "int8"),
    ),
    flag("logprobs", _OWN + "logprobs", bool, "give the answer's log-probabilities"),
    flag("output_file", _OWN + "output_file", str, "write the answers there as JSON lines"),
    flag("overwrite", _OWN + "overwrite", bool, "replace an existing output_file"),
)
