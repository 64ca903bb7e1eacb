"""One line from a model to text: `pipeline("text_generation", model=DIR)("hello", top_k=3)`."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixtral_ms.config import RunConfig, load_config
from mixtral_ms.config.checks.check_config import check_config
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.config.sections.run_section import ModelSection
from mixtral_ms.convert.formats.found_weights import Flags, find_weights
from mixtral_ms.errors import UserError
from mixtral_ms.infer.engine.sampling_params import SamplingParams
from mixtral_ms.infer.load_model import LoadedModel, load_model
from mixtral_ms.infer.predict import predict
from mixtral_ms.infer.runners.infer_weights import WeightDtype
from mixtral_ms.log import get_logger

TASK = "text_generation"
_YAML = (".yaml", ".yml")


class TextGenerationPipeline:
    """Texts to texts. Made by `pipeline`."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    def __call__(self, inputs: str | Sequence[str], **options: Any) -> list[dict[str, list[str]]]:
        """Continue one text or several.

        Args:
            inputs: the prompts.
            options: fields of SamplingParams (top_k, max_new_tokens, seed, ...); those that are
                not given are as the configuration says.

        Returns:
            One {"text_generation_text": [prompt + answer]} a prompt, as MindFormers' pipeline.

        Raises:
            UserError: an option is unknown or out of range, or a prompt cannot be answered.
        """
        if isinstance(inputs, (bytes, Mapping)) or not isinstance(inputs, Iterable):
            raise UserError(f"inputs {inputs!r}: must be a text, or several")
        prompts = [inputs] if isinstance(inputs, str) else list(inputs)
        for one in prompts:
            if not isinstance(one, str):
                raise UserError(f"prompt {one!r}: must be a text")
        answers = predict(self.model, prompts, self._params(options))
        for number, answer in enumerate(answers, 1):
            if answer.error is not None:
                raise UserError(f"prompt {number} of {len(answers)}: {answer.error}")
        return [{f"{TASK}_text": [answer.prompt + answer.text]} for answer in answers]

    def _params(self, options: dict[str, Any]) -> SamplingParams:
        known = SamplingParams.__dataclass_fields__
        for name in options:
            if name not in known:
                raise UserError(
                    f"{name!r} is no generation parameter: allowed are {', '.join(known)}"
                )
        if options.get("max_new_tokens") is not None:
            options = {"max_length": None, **options}
        if (options.get("num_beams") or 1) > 1 and self.model.params.do_sample:
            get_logger().info("num_beams: the configuration's do_sample True is left out")
            options = {"do_sample": False, **options}
        return replace(self.model.params, **options)


def pipeline(
    task: str,
    model: str | os.PathLike[str] | RunConfig,
    *,
    load_checkpoint: str | os.PathLike[str] | None = None,
    vocab_file: str | os.PathLike[str] | None = None,
    weight_dtype: WeightDtype | None = None,
    batch_size: int | None = None,
    seq_length: int | None = None,
) -> TextGenerationPipeline:
    """Load a model for text generation.

    Args:
        task: "text_generation".
        model: a folder or file of weights, in any format, with config.json, params.json or our
            own record beside it; a run's YAML; or its configuration.
        load_checkpoint: the weights, where a YAML or configuration does not name them.
        vocab_file: the tokenizer.model, where it does not lie beside the weights.
        weight_dtype: "float32", "float16" or "int8".
        batch_size: most prompts at a time.
        seq_length: longest prompt and answer together; without it as the YAML says, and 4096 at
            most where only weights are given.

    Raises:
        UserError: another task, no configuration found, or as `load_model`.
    """
    if task != TASK:
        raise UserError(f"task {task!r}: there is only {TASK!r}")
    config = model if isinstance(model, RunConfig) else _config_of(Path(model))
    config = replace(config, run_mode="predict")
    if load_checkpoint is not None:
        config.load_checkpoint = os.fspath(load_checkpoint)
    if weight_dtype is not None:
        config.weight_dtype = weight_dtype
    if batch_size is not None:
        config.predict_batch_size = batch_size
    if vocab_file is not None:
        tokenizer = replace(config.processor.tokenizer, vocab_file=os.fspath(vocab_file))
        config.processor = replace(config.processor, tokenizer=tokenizer)
    if seq_length is not None:
        config.model = replace(config.model, model_config=_longer(config, seq_length))
    check_config(config, needs_paths=False)
    return TextGenerationPipeline(load_model(config))


def _config_of(path: Path) -> RunConfig:
    if path.suffix in _YAML and path.is_file():
        return load_config(path)
    found = find_weights(path, Flags("model")).network
    if found is None:
        raise UserError(
            f"model: there is no configuration with {path} (config.json, params.json or our own "
            "record): give the run's YAML as model, and these weights as load_checkpoint"
        )
    network = found.config
    if network.max_position_embedding > network.seq_length:
        get_logger().info(
            "prompt and answer may have %d tokens together, of the network's %d: seq_length says "
            "otherwise",
            network.seq_length,
            network.max_position_embedding,
        )
    return _predicting(network, path)


def _longer(config: RunConfig, seq_length: int) -> MixtralConfig:
    """The network with another context, and a cache that holds at least one such sequence."""
    network = config.model.model_config
    if isinstance(seq_length, bool) or not isinstance(seq_length, int) or seq_length < 1:
        raise UserError(f"seq_length {seq_length!r}: must be a whole number, at least 1")
    blocks = max(network.num_blocks, -(-seq_length // network.block_size))
    return replace(network, seq_length=seq_length, num_blocks=blocks)


def _predicting(network: MixtralConfig, weights: Path) -> RunConfig:
    config = RunConfig(
        load_checkpoint=str(weights),
        model=ModelSection(model_config=replace(network, use_past=True)),
        moe_config=network.moe_config,
    )
    config.context.device_target = "CPU"
    return config
