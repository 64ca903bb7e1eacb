"""From a run's configuration to an engine that is ready to answer."""

import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mixtral_ms.config import RunConfig
from mixtral_ms.config.derived.prediction import prediction_batch
from mixtral_ms.config.loading.resolve import effective_parallel
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.convert.run_weights import (
    find_run_weights,
    open_run_weights,
    run_template,
    run_tokenizer,
)
from mixtral_ms.data.conversations.chat_template import MISTRAL, ChatTemplate
from mixtral_ms.data.conversations.conversation_encoder import (
    ConversationEncoder,
    conversation_encoder,
)
from mixtral_ms.data.tokenizer.tokenizer import Tokenizer
from mixtral_ms.infer.engine.engine import Engine, Prompt
from mixtral_ms.infer.engine.sampling_params import SamplingParams
from mixtral_ms.infer.runners.infer_weights import load_weights
from mixtral_ms.infer.runners.select_runner import select_runner
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.comm.launched import is_launched
from mixtral_ms.parallel.grid.mesh import Mesh


@dataclass(frozen=True)
class LoadedModel:
    """A network that answers, with all that a caller needs around it."""

    config: RunConfig
    engine: Engine
    tokenizer: Tokenizer
    runner: str
    """"C++" or "graph"."""
    seconds: float
    """How long loading took."""
    template: str | ChatTemplate = MISTRAL
    """Of chats."""
    template_source: str = ""
    """Who says so, in words."""
    rank: int = 0
    """Of this process, where several share the network; the first one speaks for all."""

    @property
    def network(self) -> MixtralConfig:
        """The network's configuration."""
        return self.config.model.model_config

    @cached_property
    def params(self) -> SamplingParams:
        """How the configuration says answers are generated."""
        return sampling_params(self.config)

    @cached_property
    def chat_encoder(self) -> ConversationEncoder:
        """What makes prompts of conversations, with the template that the weights were made for."""
        return self.encoder_of(self.template)

    def encoder_of(self, template: str | ChatTemplate) -> ConversationEncoder:
        """What makes prompts of conversations, with another template."""
        return conversation_encoder(self.tokenizer, template, self.network.eos_id)

    def prompt(self, text: str) -> Prompt:
        """A text as the engine takes it: as ids where the tokenizer's bos or eos are not as usual.

        Raises:
            UserError: the text cannot be encoded.
        """
        section, tokenizer = self.config.processor.tokenizer, self.tokenizer
        if section.add_bos_token and not section.add_eos_token:
            return text
        bos = [tokenizer.bos_id] if section.add_bos_token and tokenizer.bos_id >= 0 else []
        end = self.network.eos_id
        eos = [end] if section.add_eos_token and end is not None else []
        return [*bos, *tokenizer.encode(text), *eos]


def load_model(config: RunConfig, mesh: Mesh | None = None) -> LoadedModel:
    """Open tokenizer and weights, and build the engine that the configuration describes.

    On a CPU the C++ runner is taken where it can be had; any other device, and several ranks, run
    MindSpore graphs. Several ranks must all be asked the same, in the same order.

    Args:
        config: the run.
        mesh: the ranks, if the caller has met them; else they are met here.

    Raises:
        UserError: no weights or tokenizer are given, they do not fit the network, are damaged or
            not finite, a generation key is out of range, or the device cannot be used.
        DamagedFileError: a file is not what its format says.
    """
    start = time.monotonic()
    network = config.model.model_config
    sampling_params(config)
    found = find_run_weights(config)
    tokenizer = _open_tokenizer(config, run_tokenizer(config, found))
    mesh = mesh or _meet(config)
    weights = load_weights(open_run_weights(config, found), network, config.weight_dtype, mesh)
    backend = "auto" if config.context.device_target == "CPU" else "graph"
    batch = prediction_batch(config)
    runner = select_runner(network, weights, backend=backend, mesh=mesh, batch=batch)
    engine = Engine(runner, tokenizer, network, max_batch_size=batch)
    seconds = time.monotonic() - start
    get_logger().info(
        "%s runner, %s weights from %s, loaded in %.1f s",
        runner.name,
        config.weight_dtype,
        config.load_checkpoint,
        seconds,
    )
    template, source = run_template(config, found)
    return LoadedModel(config, engine, tokenizer, runner.name, seconds, template, source, mesh.rank)


def _meet(config: RunConfig) -> Mesh:
    """The processes that share the network, each with its device."""
    if not is_launched() and config.context.device_target == "CPU":
        return Mesh()  # without MindSpore, whose import takes seconds: C++ may do
    from mixtral_ms.parallel.comm.device import set_up_device  # noqa: PLC0415
    from mixtral_ms.parallel.comm.process_groups import connect  # noqa: PLC0415

    set_up_device(config)
    return connect(effective_parallel(config)) if is_launched() else Mesh()


def sampling_params(config: RunConfig) -> SamplingParams:
    """model_config's generation keys, the section `generation` and the run's seed.

    Raises:
        UserError: a value is out of range, or two contradict each other.
    """
    network, section = config.model.model_config, config.generation
    params = SamplingParams.from_model_config(
        network,
        seed=config.seed,
        min_p=section.min_p,
        presence_penalty=section.presence_penalty,
        stop=tuple(section.stop),
        num_beams=section.num_beams,
        logprobs=section.logprobs,
    )
    # As in MindFormers: who says how long the answer may be does not mean max_decode_length too.
    return params if params.max_new_tokens is None else replace(params, max_length=None)


def _open_tokenizer(config: RunConfig, path: Path) -> Tokenizer:
    tokenizer, network = Tokenizer(path), config.model.model_config
    for name, theirs, ours in (
        ("bos", tokenizer.bos_id, [network.bos_token_id]),
        ("eos", tokenizer.eos_id, network.eos_token_ids),
    ):
        if theirs not in ours:
            get_logger().warning(
                "%s: its %s is %d, model_config.%s_token_id is %s: is it this network's tokenizer?",
                path, name, theirs, name, ", ".join(map(str, ours)) or "none",
            )  # fmt: skip
    return tokenizer
