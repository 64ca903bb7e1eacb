"""What a LoRA run has besides any run: the weights that it is for, and PEFT's files."""

from pathlib import Path

from mixtral_ms.config import RunConfig
from mixtral_ms.convert.lora import base_record, fingerprint
from mixtral_ms.convert.peft import write_peft
from mixtral_ms.model.mixtral import MixtralForCausalLM

PEFT_FOLDER = "peft"


def base_of(config: RunConfig, network: MixtralForCausalLM) -> dict[str, str]:
    """The record of the weights beneath the adapters."""
    tensors = ((p.name, p.shape, p.asnumpy().__getitem__) for p in network.weights())
    return base_record(config.load_checkpoint or "", fingerprint(tensors))


def save_peft(config: RunConfig, network: MixtralForCausalLM) -> Path:
    """Write the adapters in PEFT's format; returns the folder, in output_dir."""
    folder = Path(config.output_dir) / PEFT_FOLDER
    arrays = {p.name: p.asnumpy() for p in network.trainable_params()}
    write_peft(folder, arrays, network.config.pet_config, config.load_checkpoint or "")
    return folder


def trained_text(network: MixtralForCausalLM) -> str:
    """How many parameters are trained, and of LoRA what is adapted."""
    trained = sum(p.size for p in network.trainable_params())
    pet = network.config.pet_config
    if pet is None:
        return f"{trained:,} parameters"
    modules = pet.modules(network.config.num_layers)
    kinds = sorted({module.rpartition(".")[2] for module in modules})
    text = ", ".join(kinds).replace("dense", "router")
    total = sum(p.size for p in network.weights())
    return f"{total:,} frozen parameters, {trained:,} of LoRA (rank {pet.lora_rank}, {text})"
