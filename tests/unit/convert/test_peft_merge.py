"""An adapter in PEFT's format added to weights by a conversion."""

import numpy as np
from helpers import convert_oracle as oracle

from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.convert.adapters.peft_export import write_peft
from mixtral_ms.convert.job.conversion import ConvertOptions, convert, prepare
from mixtral_ms.parallel.grid.sharding_rules import adapter_shapes

PET = PetSection(lora_rank=2, lora_alpha=6.0, target_modules=".*wq|.*wo")
NETWORK = oracle.network(pet_config=PET)


def test_weights_with_the_product_added(tmp_path):
    weights = oracle.write_source(tmp_path / "in", "hf")
    random = np.random.default_rng(0)
    adapters = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in adapter_shapes(NETWORK).items()
    }
    write_peft(tmp_path / "peft", adapters, PET, None)
    options = ConvertOptions(tmp_path / "in", tmp_path / "out", "hf", merge_lora=tmp_path / "peft")
    convert(prepare(options))
    for layer in range(oracle.LAYERS):
        for ours, theirs in (("wq", "q_proj"), ("wo", "o_proj")):
            at = f"model.layers.{layer}.attention.{ours}"
            delta = np.float32(3.0) * (adapters[f"{at}.lora_b"] @ adapters[f"{at}.lora_a"])
            weights[f"model.layers.{layer}.self_attn.{theirs}.weight"] += delta
    oracle.assert_same(oracle.tensors_in(tmp_path / "out"), weights)
