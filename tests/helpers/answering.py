"""A network small enough to answer in no time, with Mixtral's tokenizer, as files."""

import shutil

import numpy as np
import yaml
from safetensors.numpy import save_file

from helpers.numpy_runner import random_tensors
from mixtral_ms.config import load_config
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer

CONTEXT = 64


def make_model(folder):
    """Weights, tokenizer and YAML in `folder`; returns the YAML's path."""
    tree = {
        "run_mode": "predict",
        "output_dir": str(folder / "output"),
        "load_checkpoint": str(folder / "weights"),
        "model": {
            "model_config": {
                "seq_length": CONTEXT,
                "vocab_size": 32000,
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 4,
                "n_kv_heads": 2,
                "intermediate_size": 48,
                "compute_dtype": "float32",
                "use_past": True,
                "do_sample": False,
                "max_decode_length": CONTEXT,
                "num_blocks": 64,
            }
        },
        "moe_config": {"expert_num": 4},
        "context": {"device_target": "CPU"},
    }
    path = folder / "predict.yaml"
    path.write_text(yaml.safe_dump(tree))
    write_weights(folder / "weights", network(path))
    shutil.copy(find_example_tokenizer(), folder / "weights" / "tokenizer.model")
    return path


def network(yaml_path):
    """The network's configuration."""
    return load_config(yaml_path).model.model_config


def write_weights(folder, config, **changes):
    """Random weights; `changes` maps a tensor's name to a function of its values."""
    folder.mkdir(exist_ok=True)
    tensors = random_tensors(config)
    for name, change in changes.items():
        tensors[name] = change(tensors[name])
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
