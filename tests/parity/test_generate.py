"""Answers are those of transformers' generate on the same weights, alone and in a batch."""

from dataclasses import dataclass, field

import mindspore
import numpy as np
import pytest
import torch
import transformers
from helpers import hf
from helpers.infer_runners import RUNNERS, build_runner
from helpers.toy_tokenizer import ToyTokenizer
from mindspore import Tensor

from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.infer.engine.engine import Engine
from mixtral_ms.infer.engine.sampling_params import SamplingParams
from mixtral_ms.model.mixtral import MixtralForCausalLM

pytestmark = pytest.mark.usefixtures("device")

NEW_TOKENS = 64
PROMPT_LENGTHS = (1, 2, 5, 11, 16, 17, 23, 30)
CONTEXT = max(PROMPT_LENGTHS) + NEW_TOKENS
CHUNK = 16
LOGPROB_TOLERANCE = 5e-4


_KEPT_ALIVE = []
"""MindSpore remembers parsed cells by their address: one that takes a dead one's is mistaken."""


@dataclass
class Case:
    """Sizes that no axis shares with another."""

    name: str
    heads: tuple[int, int, int]
    experts: tuple[int, int]
    sizes: dict = field(default_factory=dict)

    def config(self):
        heads, kv_heads, head_dim = self.heads
        sizes = {"hidden_size": 40, "intermediate_size": 56, "num_layers": 2, "vocab_size": 97}
        return MixtralConfig(
            seq_length=CONTEXT,
            num_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            use_past=True,
            compute_dtype="float32",
            pad_token_id=-1,
            init_method_std=0.25,
            moe_config=MoEConfig(expert_num=self.experts[0], num_experts_chosen=self.experts[1]),
            **{**sizes, **self.sizes},
        )


CASES = (
    Case("8 experts top-2", (4, 2, 10), (8, 2)),
    Case("window, 5 experts", (6, 2, 6), (5, 2), {"sliding_window": 13, "hidden_size": 36}),
    Case(
        "tied, one kv head, 16 experts top-4",
        (5, 1, 8),
        (16, 4),
        {"tie_word_embeddings": True, "theta": 1e6, "vocab_size": 131, "num_layers": 3},
    ),
)


@dataclass
class Setting:
    """One model with its runner, and transformers' answers."""

    config: MixtralConfig
    model: transformers.MixtralForCausalLM
    prompts: list
    answers: dict
    """What transformers gave; kept, as every runner is compared with the same."""
    runner: object = None

    def engine(self, **options):
        options = {"prefill_chunk": CHUNK, **options}
        return Engine(self.runner, ToyTokenizer(self.config.vocab_size), self.config, **options)

    def theirs(self, prompt, **options):
        key = (tuple(prompt), tuple(options.items()))
        if key not in self.answers:
            self.answers[key] = self._generate(prompt, options)
        return self.answers[key]

    def _generate(self, prompt, options):
        settings = transformers.GenerationConfig(
            **{
                "max_new_tokens": NEW_TOKENS,
                "do_sample": False,
                "pad_token_id": 0,
                "use_cache": True,
                **options,
            }
        )
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        return tuple(out[0, len(prompt) :].tolist())


def make_prompts(config):
    generator = np.random.default_rng(11)
    return [generator.integers(3, config.vocab_size, n).tolist() for n in PROMPT_LENGTHS]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def model(request):
    # Threads cost more than they bring at these sizes, by far when other work runs beside.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = request.param.config()
    reference = hf.reference_model(config, seed=5)
    reference.generation_config = transformers.GenerationConfig()  # no eos: 64 tokens each
    yield Setting(config, reference, make_prompts(config), {})
    torch.set_num_threads(threads)


SLOW_RUNNERS = ("graph",)  # compiles a network for each of a step's shapes


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW_RUNNERS else name
        for name in RUNNERS
    ],
)
def setting(model, request, device):
    before = mindspore.get_context("mode")
    tensors = {n: p.detach().numpy() for n, p in model.model.named_parameters()}
    ours = {n: np.ascontiguousarray(v) for n, v in hf.to_our_names(tensors, model.config).items()}
    model.runner = build_runner(request.param, model.config, ours)
    yield model
    mindspore.set_context(mode=before)


def params(**changes):
    return SamplingParams(
        **{"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": True, **changes}
    )


@pytest.fixture(scope="module")
def batched(setting):
    return setting.engine().generate(setting.prompts, params(prompt_logprobs=True))


def test_greedy_equals_transformers_in_a_ragged_batch(setting, batched):
    for prompt, answer in zip(setting.prompts, batched, strict=True):
        assert answer.token_ids == setting.theirs(prompt)


def test_alone_gives_the_same_bits(setting, batched):
    for prompt, expected in zip(setting.prompts, batched, strict=True):
        (answer,) = setting.engine().generate([prompt], params(prompt_logprobs=True))
        assert answer.token_ids == expected.token_ids
        assert answer.logprobs == expected.logprobs
        assert answer.prompt_logprobs == expected.prompt_logprobs


def test_smaller_batches_give_the_same_bits(setting, batched):
    for size in (2, 5):
        answers = setting.engine(max_batch_size=size).generate(
            setting.prompts[::-1], params(prompt_logprobs=True)
        )
        for answer, expected in zip(answers[::-1], batched, strict=True):
            assert answer.token_ids == expected.token_ids
            assert answer.logprobs == expected.logprobs


def test_rescoring_in_one_pass_gives_the_same_logprobs(setting, batched, report_error):
    """The test of mistral-inference: generate, then score everything at once."""
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    network = MixtralForCausalLM(setting.config, batch_size=len(batched))
    _KEPT_ALIVE.append(network)
    hf.copy_weights(setting.model, network)
    rows = [[*one.prompt_token_ids, *one.token_ids] for one in batched]
    ids = np.zeros((len(rows), CONTEXT), np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    logits = network(Tensor(ids)).asnumpy().astype(np.float64)
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, (one, row) in enumerate(zip(batched, rows, strict=True)):
        expected = logprobs[i, np.arange(len(row) - 1), row[1:]]
        error = np.abs(np.array([*one.prompt_logprobs, *one.logprobs]) - expected).max()
        report_error("log-probability", error, LOGPROB_TOLERANCE)
        assert error < LOGPROB_TOLERANCE


def test_preempted_requests_answer_the_same(setting, batched):
    blocks = -(-CONTEXT // setting.runner.block_size)
    one = setting.engine()
    one._scheduler.pool.allocate(setting.runner.num_blocks - blocks - 2)
    answers = one.generate(setting.prompts, params())
    assert [a.token_ids for a in answers] == [a.token_ids for a in batched]
    assert [a.logprobs for a in answers] == [a.logprobs for a in batched]


@pytest.mark.slow
def test_repetition_penalty_equals_transformers(setting):
    answers = setting.engine().generate(setting.prompts, params(repetition_penalty=1.4))
    for prompt, answer in zip(setting.prompts, answers, strict=True):
        assert answer.token_ids == setting.theirs(prompt, repetition_penalty=1.4)


@pytest.mark.parametrize("beams, penalty", [(2, 1.0), (4, 1.0), (3, 1.2)])
def test_beams_equal_transformers(setting, beams, penalty):
    prompts = setting.prompts[2:5]
    wanted = params(
        num_beams=beams, repetition_penalty=penalty, max_new_tokens=20, ignore_eos=False
    )
    eos = setting.theirs(prompts[0], num_beams=beams, max_new_tokens=20)[9]
    setting.config.eos_token_id = eos
    answers = setting.engine().generate(prompts, wanted)
    setting.config.eos_token_id = 2
    for prompt, answer in zip(prompts, answers, strict=True):
        theirs = setting.theirs(
            prompt,
            num_beams=beams,
            max_new_tokens=20,
            eos_token_id=eos,
            repetition_penalty=penalty,
        )
        assert answer.token_ids == theirs


def test_a_seed_decides_a_sample(setting):
    drawn = [
        params(do_sample=True, seed=seed, temperature=1.5, top_k=30, max_new_tokens=16)
        for seed in (1, 2, 1, 3)
    ]
    prompts = [setting.prompts[3]] * 4
    answers = [one.token_ids for one in setting.engine().generate(prompts, drawn)]
    assert answers[0] == answers[2]
    assert len({*answers}) == 3
    for prompt, wanted, expected in zip(prompts, drawn, answers, strict=True):
        (alone,) = setting.engine().generate([prompt], wanted)
        assert alone.token_ids == expected
