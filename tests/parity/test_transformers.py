"""The same weights give the same logits, loss and gradients as transformers' Mixtral."""

from dataclasses import dataclass, field

import mindspore
import numpy as np
import pytest
import torch
from helpers import hf
from mindspore import Tensor

from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.objectives.causal_lm import CausalLMLoss

pytestmark = pytest.mark.usefixtures("device")

TOLERANCE = 1e-4
BATCH = 2
PAD = 0


@dataclass
class Case:
    """A configuration with something unusual about it."""

    name: str
    heads: tuple[int, int, int]
    experts: tuple[int, int]
    backend: str = "auto"
    mode: str = "pynative"
    padding: bool = False
    sizes: dict = field(default_factory=dict)
    moe: dict = field(default_factory=dict)

    def config(self) -> MixtralConfig:
        """Sizes that no axis shares with another, so that a swapped axis shows."""
        heads, kv_heads, head_dim = self.heads
        sizes = {
            "hidden_size": 40,
            "intermediate_size": 56,
            "num_layers": 2,
            "vocab_size": 97,
            "seq_length": 19,
            "theta": 1e4,
            **self.sizes,
        }
        return MixtralConfig(
            batch_size=BATCH,
            num_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            compute_dtype="float32",
            # -1 marks no token as padding
            pad_token_id=PAD if self.padding else -1,
            # well above the usual 0.02, so that experts and router matter in the logits
            init_method_std=0.25,
            moe_config=MoEConfig(
                expert_num=self.experts[0], num_experts_chosen=self.experts[1], **self.moe
            ),
            **sizes,
        )


# Graph mode compiles for seconds a case: three of them here, and the others as PyNative.
CASES = [
    Case("8 experts top-2", heads=(4, 2, 10), experts=(8, 2), mode="graph"),
    Case(
        "16 experts top-4, uneven chunks",
        (4, 4, 6),
        (16, 4),
        mode="graph",
        sizes={"num_layers": 1, "seq_length": 150},
    ),
    Case(
        "tied, window, padding, reference",
        (6, 2, 8),
        (12, 3),
        "plain",
        "graph",
        padding=True,
        sizes={"num_layers": 1, "tie_word_embeddings": True, "sliding_window": 7},
    ),
    Case("one kv head, long theta, deep", (5, 1, 8), (8, 2), sizes={"theta": 1e6, "num_layers": 4}),
    Case("wide heads, top-1", (3, 3, 18), (4, 1)),
    Case("2 experts top-1", (2, 1, 20), (2, 1), "plain"),
    Case("2 experts top-2", (4, 2, 12), (2, 2)),
    Case("3 experts top-3, large eps", (6, 3, 4), (3, 3), sizes={"rms_norm_eps": 1e-2}),
    Case("window", (4, 2, 10), (8, 2), sizes={"sliding_window": 5}),
    Case(
        "window over chunks",
        (4, 2, 10),
        (5, 2),
        "plain",
        sizes={"sliding_window": 24, "seq_length": 150},
    ),
    Case("padding", (4, 2, 10), (8, 2), padding=True),
    Case("padding, reference", (4, 2, 10), (7, 3), "plain", padding=True),
    Case("tied embeddings", (4, 2, 10), (6, 2), sizes={"tie_word_embeddings": True}),
    Case("capacity not exceeded", (4, 2, 10), (4, 2), moe={"capacity_factor": 100.0}),
    Case(
        "capacity not exceeded, reference",
        (4, 2, 10),
        (4, 2),
        "plain",
        padding=True,
        moe={"capacity_factor": 100.0, "enable_sdrop": True},
    ),
    Case("emulated Ascend", (4, 2, 16), (8, 2), "ascend", "graph", sizes={"num_layers": 1}),
    Case(
        "emulated Ascend, tied, operators of single steps",
        (4, 4, 16),
        (4, 3),
        "ascend",
        sizes={
            "tie_word_embeddings": True,
            "use_fused_rope": False,
            "use_fused_swiglu": False,
            "residual_dtype": "float32",
        },
    ),
    Case(
        "emulated Ascend, window, padding",
        (6, 2, 16),
        (8, 2),
        "ascend",
        padding=True,
        sizes={"sliding_window": 5},
    ),
    Case(
        "emulated Ascend, capacity",
        (4, 2, 16),
        (4, 2),
        "ascend",
        padding=True,
        moe={"capacity_factor": 100.0},
    ),
]


@dataclass
class Inputs:
    """One batch; `valid` marks real tokens, labels are already shifted."""

    ids: np.ndarray
    labels: np.ndarray
    valid: np.ndarray


def make_inputs(config: MixtralConfig, padding: bool, seed: int = 7) -> Inputs:
    generator = np.random.default_rng(seed)
    shape = (BATCH, config.seq_length)
    ids = generator.integers(1, config.vocab_size, shape).astype(np.int32)
    labels = np.roll(ids, -1, axis=1)
    labels[:, -1] = -100
    labels[0, 3] = -100  # an unsupervised position in the middle
    valid = np.ones(shape, bool)
    if padding:
        real = config.seq_length - 6
        valid[1, real:] = False
        ids[1, real:] = PAD
        labels[1, real - 1 :] = -100
    return Inputs(ids, labels, valid)


def theirs(model, inputs: Inputs):
    """transformers' logits and mean loss over the same shifted labels."""
    output = model(
        torch.from_numpy(inputs.ids.astype(np.int64)),
        attention_mask=torch.from_numpy(inputs.valid.astype(np.int64)),
        output_router_logits=True,
    )
    loss = torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1), torch.from_numpy(inputs.labels.astype(np.int64)).flatten()
    )
    return output, loss


def build(case: Case):
    config = case.config()
    model = hf.reference_model(config)
    network = MixtralForCausalLM(config, backend=case.backend)
    hf.copy_weights(model, network)
    return config, model, network


def marked(case):
    """Compiling takes seconds; PyNative mode computes the same network without."""
    return pytest.param(case, marks=pytest.mark.slow) if case.mode == "graph" else case


@pytest.fixture(params=map(marked, CASES), ids=lambda case: case.name)
def case(request):
    before = mindspore.get_context("mode")
    graph = request.param.mode == "graph"
    mindspore.set_context(mode=mindspore.GRAPH_MODE if graph else mindspore.PYNATIVE_MODE)
    if request.param.backend == "ascend":
        request.getfixturevalue("ascend_emulation")
    yield request.param
    mindspore.set_context(mode=before)


def test_logits_loss_and_every_gradient(case, record_error):
    config, model, network = build(case)
    inputs = make_inputs(config, case.padding)
    output, expected_loss = theirs(model, inputs)
    expected_loss.backward()

    logits = network(Tensor(inputs.ids)).asnumpy()[inputs.valid]
    record_error("logits", logits, output.logits.detach().numpy()[inputs.valid], TOLERANCE)
    weights = mindspore.ParameterTuple(network.trainable_params())
    value_and_grad = mindspore.value_and_grad(CausalLMLoss(network), None, weights, has_aux=True)
    parts, gradients = value_and_grad(Tensor(inputs.ids), Tensor(inputs.labels))
    record_error("loss", parts[0].asnumpy(), expected_loss.detach().numpy(), TOLERANCE)
    expected = hf.gradients(model, config)
    for parameter, gradient in zip(weights, gradients, strict=True):
        name, value = parameter.name, expected[parameter.name]
        if "router" in name and config.moe_config.num_experts_chosen == 1:
            # The one gate is 1 whatever the router says: rounding noise on both sides.
            assert max(np.abs(gradient.asnumpy()).max(), np.abs(value).max()) < 1e-6, name
            continue
        record_error(name, gradient.asnumpy(), value, TOLERANCE)


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("experts", [(8, 2), (5, 3), (6, 1)], ids=str)
def test_aux_loss_of_one_layer(experts, padding, pynative, record_error):
    """transformers' f_e sums to k and ours to 1: theirs is k times ours, gradients too."""
    case = Case("aux", (4, 2, 10), experts, padding=padding, sizes={"num_layers": 1})
    case.moe["aux_loss_factor"] = 1.0
    config, model, network = build(case)
    inputs = make_inputs(config, padding)
    output, _ = theirs(model, inputs)
    output.aux_loss.backward()
    parameter = network.model.layers[0].feed_forward.routed_experts.router.dense.weight

    def aux(ids):
        return network.model(ids)[1].sum()

    ours, (gradient,) = mindspore.value_and_grad(aux, None, mindspore.ParameterTuple([parameter]))(
        Tensor(inputs.ids)
    )
    k = experts[1]
    record_error("aux", ours.asnumpy() * k, output.aux_loss.item(), TOLERANCE)
    expected = dict(model.named_parameters())["model.layers.0.mlp.gate.weight"].grad.numpy()
    record_error("aux gradient", gradient.asnumpy() * k, expected, TOLERANCE)
