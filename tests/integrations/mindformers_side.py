"""What the tests of MindFormers run in its environment: SCENARIO FOLDER.

Writes what it found to FOLDER/SCENARIO.json. FOLDER holds the data and YAMLs of
test_mindformers.py.
"""

import json
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import mindspore  # before MindFormers: protobuf that others load first ends the interpreter
import numpy as np
from helpers.mindformers_sizes import MOE, NETWORK, NEW_TOKENS, PROMPT, RATE, ROWS
from mindformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MFTrainOneStepCell,
    Trainer,
    TrainingArguments,
    build_context,
    pipeline,
)
from mindformers.core.metric import PerplexityMetric
from mindformers.core.optim import build_optim
from mindformers.models import build_network
from mindformers.modules.transformer.moe import MoEConfig
from mindformers.tools.register import MindFormerConfig
from mindformers.utils.file_utils import set_output_path
from mindspore.dataset import GeneratorDataset

mindspore.set_context(mode=mindspore.GRAPH_MODE)
OURS = "mixtral_ms.integrations.mindformers"


def ours():
    """Our module, whose import registers the network: `upstream` goes without."""
    return import_module(OURS)


class Recorder(mindspore.Callback):
    """Loss and gradient norm of each step, and the result of an evaluation."""

    def __init__(self):
        super().__init__()
        self.losses, self.norms, self.evaluated = [], [], None

    def on_train_step_end(self, run_context):
        loss, _overflow, _scale, _rate, norm = run_context.original_args().net_outputs
        self.losses.append(float(loss.asnumpy()))
        self.norms.append(float(norm.asnumpy()))

    def on_eval_end(self, run_context):
        (self.evaluated,) = run_context.original_args().metrics.values()


def batches(rows):
    """The rows in their order, ROWS at a time."""
    source = GeneratorDataset([(row,) for row in rows], ["input_ids"], shuffle=False)
    return source.batch(ROWS)


def save_weights(network, path):
    """The network's parameters as .npz."""
    np.savez(path, **{one.name: one.asnumpy() for one in network.get_parameters()})


def new_trainer(folder, config_class, network_class, output="output"):
    """A Trainer as MindFormers' users make one."""
    with np.load(folder / "rows.npz") as rows:
        train, evaluation = batches(rows["train"]), batches(rows["eval"])
    mindspore.set_seed(0)
    recorder = Recorder()
    trainer = Trainer(
        task="text_generation",
        model=network_class(config_class(**NETWORK, moe_config=MoEConfig(**MOE))),
        args=TrainingArguments(
            output_dir=str(folder / output), batch_size=ROWS, num_train_epochs=1, **RATE
        ),
        train_dataset=train,
        eval_dataset=evaluation,
        tokenizer=LlamaTokenizer(vocab_file=str(folder / "tokenizer.model")),
        eval_callbacks=[recorder],  # which MindFormers adds to those of training
    )
    trainer.config.runner_config.epochs = 1
    return trainer, recorder


def generated(answer):
    """The text of MindFormers' answer to one prompt."""
    return answer[0]["text_generation_text"][0]


def calls(folder):
    """Train, evaluate, predict and finetune, one after another, and the pipeline."""
    classes = ours().MindFormersMixtralConfig, ours().MindFormersMixtral
    trainer, recorder = new_trainer(folder, *classes)
    trainer.train()
    found = {"losses": recorder.losses, "norms": recorder.norms}
    save_weights(trainer.model, folder / "trained.npz")
    trainer.model.set_train(False)
    trainer.evaluate()
    found["evaluated"] = recorder.evaluated
    options = {"max_length": 24, "repetition_penalty": 1, "top_k": 3, "top_p": 1}
    found["sampled"] = generated(trainer.predict(input_data=PROMPT, **options))
    answer = pipeline("text_generation", model=trainer.model, tokenizer=trainer.tokenizer)
    found["piped"] = generated(answer(PROMPT, do_sample=False, max_new_tokens=NEW_TOKENS))
    again, recorder = new_trainer(folder, *classes, output="again")
    again.finetune(finetune_checkpoint=str(trained_checkpoint(folder)))
    found["finetuned"] = recorder.losses
    return found


def trained_checkpoint(folder):
    """What MindFormers saved at the end of training."""
    (path,) = (folder / "output/checkpoint_network/rank_0").glob("*.ckpt")
    return path


def upstream(folder):
    """The same calls on MindFormers' own network: those that work."""
    works = []
    for call in ("train", "evaluate", "predict", "finetune"):
        trainer, _ = new_trainer(folder, LlamaConfig, LlamaForCausalLM)
        if call == "evaluate":
            trainer.model.set_train(False)
        given = {"input_data": PROMPT, "max_length": 24} if call == "predict" else {}
        try:
            getattr(trainer, call)(**given)
        except (TypeError, ValueError, RuntimeError) as error:
            print(call, "fails:", str(error).splitlines()[0])
        else:
            works.append(call)
    return works


def launched(folder, name):
    """What MindFormers' run_mindformer.py does with a YAML; returns the Trainer's answer."""
    config = MindFormerConfig(str(folder / name))
    set_output_path(config.output_dir)
    build_context(config)
    trainer = Trainer(config)
    answer = None
    if config.run_mode == "predict":
        config.input_data = PROMPT
        answer = trainer.predict(
            predict_checkpoint=config.load_checkpoint, input_data=config.input_data
        )
    else:
        trainer.train()
    network = trainer.trainer.network
    while hasattr(network, "network"):
        network = network.network
    save_weights(network, (folder / name).with_suffix(".npz"))
    return {"network": type(network).__name__, "answer": answer and generated(answer)}


def launch_finetune(folder):
    """The YAML of fine-tuning, from weights that our Trainer saved, with --register_path."""
    os.environ["REGISTER_PATH"] = str(Path(find_spec(OURS).origin).parent)
    return launched(folder, "finetune.yaml")


def launch_predict(folder):
    """The YAML of prediction, with weights that our Trainer saved."""
    ours()
    return launched(folder, "predict.yaml")


def built(**changes):
    """A network without a capacity limit, its auxiliary loss too small to be seen."""
    moe = {**MOE, "capacity_factor": -1.0, "aux_loss_factor": 1e-9, **changes.pop("moe", {})}
    config = ours().MindFormersMixtralConfig(
        **{**NETWORK, "batch_size": ROWS, "moe_config": moe, **changes}
    )
    return ours().MindFormersMixtral(config)


def refused(**changes):
    """What is said of a configuration that Mixtral has not."""
    try:
        built(**changes)
    except ValueError as error:
        return str(error)
    return "accepted"


def training_loss(network, ids, **inputs):
    network.set_train()
    inputs = {name: mindspore.Tensor(value, mindspore.int32) for name, value in inputs.items()}
    return float(network(mindspore.Tensor(ids), **inputs).asnumpy())


def metric_loss(network, ids):
    """What MindFormers' metric makes of the network's outputs in evaluation."""
    network.set_train(False)
    metric = PerplexityMetric()
    metric.clear()
    metric.update(*network(mindspore.Tensor(ids)))
    return metric.eval()["loss"]


def losses(_folder):
    """The loss of one batch in all the ways that MindFormers' data may ask for it."""
    ids = np.random.default_rng(0).integers(1, NETWORK["vocab_size"], (ROWS, 65)).astype(np.int32)
    mask = np.zeros_like(ids)
    mask[:, :33] = 1
    network, sliced = built(), built(input_sliced_sig=True)
    sliced.set_train()
    found = {
        "whole": [training_loss(network, ids), metric_loss(network, ids)],
        "sliced": training_loss(sliced, ids[:, :-1], labels=ids[:, 1:]),
        "fewer_rows": [training_loss(network, ids[:3]), metric_loss(network, ids[:3])],
        "part": [
            training_loss(network, ids, loss_mask=mask),
            training_loss(network, ids, labels=np.where(mask, ids, -100)),
            training_loss(network, ids * mask),  # the rest is padding
        ],
    }
    try:
        training_loss(network, np.concatenate([ids, ids]))
    except ValueError as error:
        found["more_rows"] = str(error)
    return found


def registered(experts):
    """The module of the network that MindFormers makes of its YAMLs' names."""
    config = {"model_config": {"type": "LlamaConfig", **NETWORK, **experts}}
    config["arch"] = {"type": "LlamaForCausalLM"}
    return type(build_network(MindFormerConfig(**config))).__module__


def steps(_folder):
    """A step whose gradients overflow, and one whose do not; names and refusals."""
    network = built()
    network.set_train()
    weight = network.losses[0].network.lm_head.weight
    optimizer = build_optim(
        {"type": "FP32StateAdamWeightDecay", "beta1": 0.9, "beta2": 0.95, "learning_rate": 1e-3},
        default_args={"params": network.trainable_params()},
    )
    step = MFTrainOneStepCell(network, optimizer, scale_sense=mindspore.Tensor(3e38))
    ids = mindspore.Tensor(np.ones((ROWS, 65), np.int32))
    before, outcome = weight.asnumpy().copy(), []
    for scale in (3e38, 1.0):
        step.set_sense_scale(mindspore.Tensor(scale, mindspore.float32))
        overflow = step(ids)[1]
        outcome.append([bool(overflow), bool((weight.asnumpy() != before).any())])
    return {
        "overflow": outcome,
        "names": sorted(one.name for one in network.get_parameters()),
        "types": [registered({"moe_config": MOE}), registered({})],
        "refused": [
            refused(moe={"expert_num": 1, "num_experts_chosen": 1}),
            refused(moe={"routing_policy": "TopkRouterV1"}),
            refused(moe={"shared_expert_num": 1}),
            refused(parallel_config={"model_parallel": 2}),
            refused(pet_config={"pet_type": "lora"}),
        ],
    }


def main():
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    found = globals()[scenario](folder)
    (folder / f"{scenario}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
