"""Networks with adapters that change something, and their checkpoints."""

import dataclasses

import numpy as np
from mindspore import Tensor

from mixtral_ms.checkpoint.shards.rank_files import ADAPTER_STEM
from mixtral_ms.checkpoint.store.store import save_checkpoint
from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.convert.adapters.lora_weights import base_record, fingerprint
from mixtral_ms.model.mixtral import MixtralForCausalLM

ATTENTION = ".*wq|.*wk|.*wv|.*wo"
EVERYTHING = rf"{ATTENTION}|.*w[123]|.*router\.dense"


def pet(target_modules=ATTENTION, rank=3, alpha=5.0, dropout=0.0):
    return PetSection(
        lora_rank=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules
    )


def adapted_network(config, section, seed=0):
    """A network whose A and B are random: B of zeros would hide every mistake."""
    network = MixtralForCausalLM(dataclasses.replace(config, pet_config=section))
    generator = np.random.default_rng(seed)
    for parameter in network.trainable_params():
        values = generator.normal(0, 0.2, parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(values))
    return network


def adapters_of(network):
    return {p.name: p.asnumpy().copy() for p in network.trainable_params()}


def save_adapter(root, network, base="base"):
    """A checkpoint as a LoRA run leaves it, without optimizer state."""
    tensors = ((p.name, p.shape, p.asnumpy().__getitem__) for p in network.weights())
    state = {
        "step": 1,
        "model_config": dataclasses.asdict(network.config),
        "base": base_record(str(base), fingerprint(tensors)),
    }
    return save_checkpoint(root, "a-step_1", {ADAPTER_STEM: adapters_of(network)}, state)
