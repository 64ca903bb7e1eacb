"""One Trainer for every run mode, driven by the configuration alone.

MindSpore takes seconds to import, and a single process that answers on a CPU can do without: it is
imported with the first thing that computes in graphs.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mixtral_ms.config import RunConfig, load_config
from mixtral_ms.config.checks.check_config import check_config
from mixtral_ms.infer.engine.sampling_params import Generation
from mixtral_ms.infer.load_model import LoadedModel, load_model
from mixtral_ms.infer.predict import predict
from mixtral_ms.infer.text.prompts import read_prompts
from mixtral_ms.parallel.comm.launched import is_launched, started_processes
from mixtral_ms.parallel.grid.mesh import Mesh

if TYPE_CHECKING:
    from mixtral_ms.train.evaluation import Evaluation
    from mixtral_ms.train.objectives.objective import MakeObjective
    from mixtral_ms.train.training_run import TrainResult


class Trainer:
    """Trains, evaluates and samples the network that a configuration describes.

    Under a launcher of several processes each of them makes one, and they meet here.

    Args:
        config: a RunConfig, or the path of a YAML.
        objective: what training makes smaller and evaluation measures; None is causal language
            modelling.

    Raises:
        UserError: the configuration contradicts itself, names files that do not exist, does not
            fit the number of processes, or is another one on another rank; or the device cannot be
            used.
    """

    def __init__(
        self,
        config: RunConfig | str | os.PathLike[str],
        *,
        objective: "MakeObjective | None" = None,
    ) -> None:
        self.config = config if isinstance(config, RunConfig) else load_config(Path(config))
        self._objective = objective
        check_config(self.config, world_size=started_processes())
        if not self._answers_alone:
            _ = self.mesh

    @property
    def _answers_alone(self) -> bool:
        return self.config.mode.answers and not is_launched()

    @cached_property
    def mesh(self) -> Mesh:
        """This rank among those of the run, with its device."""
        from mixtral_ms.train.state.rank_agreement import connect_ranks  # noqa: PLC0415

        return connect_ranks(self.config)

    @cached_property
    def objective(self) -> "MakeObjective":
        """What training makes smaller and evaluation measures."""
        from mixtral_ms.train.objectives.causal_lm import CausalLMObjective  # noqa: PLC0415

        return self._objective or CausalLMObjective

    @cached_property
    def model(self) -> LoadedModel:
        """What answers: the engine, the tokenizer, and how the configuration says to answer.

        Raises:
            UserError: weights and tokenizer do not fit or are not given.
        """
        return load_model(self.config, None if self._answers_alone else self.mesh)

    def train(self) -> "TrainResult":
        """Train until the last step, stop_at_step, SIGTERM or Ctrl-C; always ends with a save.

        Raises:
            UserError: the data or checkpoint does not fit, or output_dir holds another run.
            NotFiniteError: too many steps in a row had gradients that are not finite.
        """
        from mixtral_ms.train.train_mode import train  # noqa: PLC0415

        return train(self.config, self.mesh, self.objective)

    def evaluate(self) -> "Evaluation":
        """Loss and perplexity over the whole of eval_dataset.

        With another weight_dtype than float32 that is what the weights are worth in that format,
        and `exact_perplexity` what they are worth as they are.

        Raises:
            UserError: no weights are given, or data or weights do not fit.
        """
        from mixtral_ms.train.evaluate_mode import evaluate  # noqa: PLC0415

        return evaluate(self.config, self.mesh, self.objective)

    def predict(self, prompts: str | Sequence[str] | None = None) -> list[Generation]:
        """Answers to prompts, in order; None takes predict_data. Weights are loaded once.

        What is wrong with one prompt is said in its answer (finish_reason "error").

        Raises:
            UserError: there is no prompt, or weights and tokenizer do not fit or are not given.
        """
        prompts = read_prompts(self.config.predict_data) if prompts is None else prompts
        return predict(self.model, [prompts] if isinstance(prompts, str) else prompts)
