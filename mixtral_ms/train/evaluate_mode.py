"""`Trainer.evaluate`: the weights of a run over the whole of its evaluation data."""

from dataclasses import replace

from mixtral_ms.config import RunConfig
from mixtral_ms.config.loading.resolve import dataset_of
from mixtral_ms.convert.run_weights import open_run_weights
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.builders import build_loader, build_network, without_adapters
from mixtral_ms.train.evaluation import Evaluation, Evaluator
from mixtral_ms.train.objectives.objective import MakeObjective
from mixtral_ms.train.state.weight_rounding import round_weights


def evaluate(config: RunConfig, mesh: Mesh, objective: MakeObjective) -> Evaluation:
    """Loss and perplexity over the whole of eval_dataset. See `Trainer.evaluate`."""
    if not config.load_checkpoint:
        raise UserError(
            "run_mode eval needs weights, but load_checkpoint is empty: set --load_checkpoint"
        )
    data = dataset_of(config, training=False)
    loader = build_loader(config, data, mesh, training=False)
    network = build_network(without_adapters(config), mesh)
    evaluator = Evaluator(network, loader, loader.batch_size, objective)
    evaluator.require_targets()
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
