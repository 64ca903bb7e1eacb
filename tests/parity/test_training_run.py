"""A training run follows transformers with torch's AdamW, step by step."""

import math
from dataclasses import dataclass

import mindspore
import numpy as np
import pytest
import torch
from helpers import hf
from helpers.text import VOCABULARY, batches, standard_library_text

from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.train_step import TrainStep

pytestmark = pytest.mark.slow

BATCH, LENGTH = 4, 64
PEAK_RATE, WARMUP, LAST_STEP = 3e-4, 10, 200
BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 2.5
BOUND = 1e-3
NORM_TOLERANCE = 1e-4


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    share = (step - WARMUP) / (LAST_STEP - WARMUP)
    return PEAK_RATE * (0.55 + 0.45 * math.cos(math.pi * share))


@dataclass
class Run:
    """Our network and step, compiled once for all tests."""

    config: MixtralConfig
    network: MixtralForCausalLM
    optimizer: AdamW
    step: TrainStep


@pytest.fixture(scope="module")
def run(device):
    before = mindspore.get_context("mode")
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    config = MixtralConfig(
        batch_size=BATCH,
        seq_length=LENGTH,
        hidden_size=128,
        intermediate_size=192,
        num_layers=2,
        num_heads=4,
        n_kv_heads=2,
        vocab_size=VOCABULARY,
        theta=1e6,
        compute_dtype="float32",
        pad_token_id=-1,
        moe_config=MoEConfig(expert_num=8, num_experts_chosen=2),
    )
    network = MixtralForCausalLM(config)
    optimizer = AdamW(network.trainable_params(), BETAS, EPS, DECAY)
    yield Run(config, network, optimizer, TrainStep(network, optimizer, max_grad_norm=CLIP))
    mindspore.set_context(mode=before)


def clip(parameters):
    """Clips to CLIP and returns the norm, in float64: torch's own, float32, is 1e-4 off for the
    32,000-row gradients here, and a factor that is off makes the runs drift apart."""
    norm = sum(float(p.grad.double().square().sum()) for p in parameters) ** 0.5
    for parameter in parameters:
        parameter.grad.mul_(min(1.0, CLIP / norm))
    return norm


def torch_losses(model, data):
    """transformers and torch.optim.AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    losses, norms = [], []
    for step, batch in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        logits = model(torch.from_numpy(batch.input_ids.astype(np.int64))).logits
        labels = torch.from_numpy(batch.labels.astype(np.int64))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(clip(list(model.parameters())))
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), np.array(norms)


def our_losses(run, model, data):
    """Starts from the model's weights and from no moments, whatever ran before."""
    hf.copy_weights(model, run.network)
    zeros = {name: np.zeros_like(value) for name, value in run.optimizer.state_tensors().items()}
    run.optimizer.load_state_tensors(zeros)
    run.optimizer.updates = 0
    results = [run.step([batch], learning_rate(i)) for i, batch in enumerate(data)]
    return np.array([r.loss for r in results]), np.array([r.grad_norm for r in results])


def follow(run, text, steps, falls_by, report):
    data = batches(text, steps, BATCH, LENGTH)
    model = hf.reference_model(run.config, seed=3)
    ours, our_norms = our_losses(run, model, data)
    theirs, norms = torch_losses(model, data)
    difference = np.abs(ours - theirs)
    report(f"{steps} steps: loss {ours[0]:.3f} -> {ours[-1]:.3f}", difference.max(), BOUND)
    assert difference.max() <= BOUND, f"step {difference.argmax()}: {difference.max():.2e}"
    np.testing.assert_allclose(our_norms, norms, rtol=NORM_TOLERANCE)
    assert norms.max() > CLIP > norms.min(), "the run must pass through both sides of the clip"
    assert theirs[-5:].mean() < theirs[0] - falls_by, "the run must have learned something"


@pytest.fixture
def wikitext(request):
    path = request.config.getoption("--data") / "wikitext-2" / "wiki.valid.tokens"
    if not path.exists():
        pytest.skip(f"{path} does not exist; --data names the folder of the data")
    return path.read_text(encoding="utf-8")


def test_15_steps_on_standard_library_text(run, report_error):
    follow(run, standard_library_text(), 15, 0.2, report_error)


def test_30_steps_on_wikitext(run, wikitext, report_error):
    follow(run, wikitext, 30, 1.0, report_error)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_200_steps_on_wikitext(run, wikitext, report_error):
    follow(run, wikitext, 200, 3.0, report_error)
