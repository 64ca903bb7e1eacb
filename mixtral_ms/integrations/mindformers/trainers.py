"""MindFormers' trainers, which tell the network the size of their batches."""

from typing import Any

from mindformers.tools.register import MindFormerConfig
from mindformers.trainer import BaseTrainer
from mindformers.trainer import CausalLanguageModelingTrainer as UpstreamCausalTrainer
from mindformers.trainer import GeneralTaskTrainer as UpstreamGeneralTrainer
from mindspore import nn

from mixtral_ms.integrations.mindformers.cpu import on_cpu
from mixtral_ms.integrations.mindformers.network import MindFormersMixtral
from mixtral_ms.log import get_logger


class _TellsBatchSize(BaseTrainer):
    """Mixed into a trainer; a network that is not ours is left alone."""

    def set_network(self, network: nn.Cell, is_train: bool = True) -> None:
        super().set_network(network, is_train)
        while not isinstance(network, MindFormersMixtral) and hasattr(network, "network"):
            network = network.network  # a cell of MindFormers around it
        if is_train and isinstance(network, MindFormersMixtral):
            network.fit_batch_size(self.train_dataset.get_batch_size())

    def set_config(self, *args: Any, **kwargs: Any) -> MindFormerConfig:
        config = super().set_config(*args, **kwargs)
        if on_cpu() and config.runner_config.sink_mode:
            # MindSpore feeds no data from a queue there and so takes the steps of a whole epoch
            # where MindFormers means sink_size: epochs would be run several times.
            get_logger().info("runner_config.sink_mode True has no effect on CPU")
            config.runner_config.sink_mode = False
        return config


class CausalLanguageModelingTrainer(_TellsBatchSize, UpstreamCausalTrainer):
    """`trainer.type: CausalLanguageModelingTrainer`."""


class GeneralTaskTrainer(_TellsBatchSize, UpstreamGeneralTrainer):
    """`trainer.type: GeneralTaskTrainer`."""
