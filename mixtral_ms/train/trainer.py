"""One Trainer for every run mode, driven by the configuration alone."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mixtral_ms.checkpoint.store.folders import list_checkpoints
from mixtral_ms.config import RunConfig, load_config
from mixtral_ms.config.checks.check_config import check_config
from mixtral_ms.config.loading.resolve import dataset_of, effective_parallel
from mixtral_ms.convert.run_weights import open_run_weights
from mixtral_ms.errors import UserError
from mixtral_ms.infer.engine.sampling_params import Generation
from mixtral_ms.infer.load_model import LoadedModel, load_model
from mixtral_ms.infer.predict import predict
from mixtral_ms.infer.text.prompts import read_prompts
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.comm.device import set_up_device
from mixtral_ms.parallel.comm.process_groups import connect, started_processes
from mixtral_ms.train.builders import (
    build_loader,
    build_network,
    metrics_path,
    without_adapters,
)
from mixtral_ms.train.evaluation import Evaluation, Evaluator
from mixtral_ms.train.objectives.causal_lm import CausalLMObjective
from mixtral_ms.train.objectives.objective import MakeObjective
from mixtral_ms.train.state.rank_agreement import (
    agree_on_storage,
    configuration_facts,
    require_same_on_all_ranks,
)
from mixtral_ms.train.state.resume import find_resume
from mixtral_ms.train.state.saver import checkpoint_root
from mixtral_ms.train.state.weight_rounding import round_weights
from mixtral_ms.train.training_run import TrainingRun, TrainResult


class Trainer:
    """Trains, evaluates and samples the network that a configuration describes.

    Under a launcher of several processes each of them makes one, and they meet here.

    Args:
        config: a RunConfig, or the path of a YAML.
        objective: what training makes smaller and evaluation measures.

    Raises:
        UserError: the configuration contradicts itself, names files that do not exist, does not
            fit the number of processes, or is another one on another rank; or the device cannot be
            used.
    """

    def __init__(
        self,
        config: RunConfig | str | os.PathLike[str],
        *,
        objective: MakeObjective = CausalLMObjective,
    ) -> None:
        self.config = config if isinstance(config, RunConfig) else load_config(Path(config))
        self.objective = objective
        check_config(self.config, world_size=started_processes())
        set_up_device(self.config)
        facts = configuration_facts(self.config)
        grid = effective_parallel(self.config)
        self.mesh = connect(grid, lambda world: require_same_on_all_ranks(world, facts))
        self._answering: LoadedModel | None = None

    def train(self) -> TrainResult:
        """Train until the last step, stop_at_step, SIGTERM or Ctrl-C; always ends with a save.

        Raises:
            UserError: the data or checkpoint does not fit, or output_dir holds another run.
            NotFiniteError: too many steps in a row had gradients that are not finite.
        """
        config, mesh = self.config, self.mesh
        root = checkpoint_root(config)
        storage = agree_on_storage(mesh, root, shared=not config.no_shared_storage)
        checkpoint = find_resume(config, mesh, storage)
        if not config.resume_training:
            _require_fresh(config)
        _require_weights(config, checkpoint is not None)
        return TrainingRun(config, mesh, storage, checkpoint, self.objective).run()

    def evaluate(self) -> Evaluation:
        """Loss and perplexity over the whole of eval_dataset.

        With another weight_dtype than float32 that is what the weights are worth in that format,
        and `exact_perplexity` what they are worth as they are.

        Raises:
            UserError: no weights are given, or data or weights do not fit.
        """
        config = self.config
        if not config.load_checkpoint:
            raise UserError(
                "run_mode eval needs weights, but load_checkpoint is empty: set --load_checkpoint"
            )
        data = dataset_of(config, training=False)
        loader = build_loader(config, data, self.mesh, training=False)
        network = build_network(without_adapters(config), self.mesh)
        evaluator = Evaluator(network, loader, loader.batch_size, self.objective)
        result = evaluator()
        if config.weight_dtype != "float32":
            round_weights(network, open_run_weights(config), config.weight_dtype)
            result = replace(evaluator(), exact_perplexity=result.perplexity)
        get_logger().info(
            "loss %.6f  perplexity %.4f  over %d tokens in %.1f s",
            result.loss,
            result.perplexity,
            result.tokens,
            result.seconds,
        )
        return result

    def predict(self, prompts: str | Sequence[str] | None = None) -> list[Generation]:
        """Answers to prompts, in order; None takes predict_data. Weights are loaded once.

        What is wrong with one prompt is said in its answer (finish_reason "error").

        Raises:
            UserError: there is no prompt, or weights and tokenizer do not fit or are not given.
        """
        prompts = read_prompts(self.config.predict_data) if prompts is None else prompts
        if self._answering is None:
            self._answering = load_model(self.config, self.mesh)
        return predict(self._answering, [prompts] if isinstance(prompts, str) else prompts)


def _require_weights(config: RunConfig, resumed: bool) -> None:
    """Fine-tuning starts from weights, and adapters are never without them."""
    adapters = config.model.model_config.pet_config is not None
    starts_from_them = config.mode.trains and config.mode.needs_weights and not resumed
    if not config.load_checkpoint and (adapters or starts_from_them):
        why = "LoRA trains adapters" if adapters else f"run_mode {config.run_mode} starts"
        how = "for" if adapters else "from"
        raise UserError(
            f"{why} {how} weights, but load_checkpoint is empty: set --load_checkpoint to them"
        )


def _require_fresh(config: RunConfig) -> None:
    """A new run must not mix with what an earlier one left."""
    metrics, root = metrics_path(config), checkpoint_root(config)
    held = metrics if metrics.exists() else root if list_checkpoints(root) else None
    if held is not None:
        raise UserError(
            f"output_dir {config.output_dir} already holds a run ({held}): go on with it by "
            "--resume_training True, or choose another --output_dir"
        )
