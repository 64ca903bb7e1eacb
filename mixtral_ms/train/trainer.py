"""One Trainer for every run mode, driven by the configuration alone."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mindspore

from mixtral_ms.checkpoint.folders import list_checkpoints
from mixtral_ms.config import RunConfig, load_config
from mixtral_ms.config.checks import check_config
from mixtral_ms.config.render import render_config
from mixtral_ms.config.training_sections import (
    LossMonitorSection,
    MetricsWriterSection,
    ReportSection,
)
from mixtral_ms.data.batch import Batch
from mixtral_ms.errors import UserError
from mixtral_ms.files import write_aside
from mixtral_ms.infer.load import LoadedModel, load_model, open_run_weights
from mixtral_ms.infer.params import Generation
from mixtral_ms.infer.predict import predict
from mixtral_ms.infer.prompts import read_prompts
from mixtral_ms.log import get_logger
from mixtral_ms.model.lora import set_dropout_keys
from mixtral_ms.train.adapters import base_of, save_peft, trained_text
from mixtral_ms.train.build import (
    build_learning_rate,
    build_loader,
    build_network,
    build_optimizer,
    build_samples,
    callback,
    metrics_path,
    set_up_device,
    tensorboard_folder,
    without_adapters,
)
from mixtral_ms.train.checkpointing import Saver, checkpoint_root, find_resume, restore
from mixtral_ms.train.diagnosis import first_non_finite
from mixtral_ms.train.evaluation import Evaluation, Evaluator
from mixtral_ms.train.loss_scale import build_loss_scale
from mixtral_ms.train.metrics import MetricsWriter
from mixtral_ms.train.monitor import StepMonitor, step_line
from mixtral_ms.train.plan import make_plan
from mixtral_ms.train.report import write_report
from mixtral_ms.train.rounding import round_weights
from mixtral_ms.train.step import TrainStep
from mixtral_ms.train.stop_request import StopRequest


class NotFiniteError(RuntimeError):
    """Training ended because its numbers are no longer finite."""


@dataclass(frozen=True)
class TrainResult:
    """How a training run ended.

    Attributes:
        step: optimizer steps done, those of earlier processes of the run included.
        loss: of the last step.
        evaluation: the last evaluation, None without one.
        checkpoint: folder of the run's checkpoints.
        report: the report, None when it is switched off or the run goes on later.
        signal_number: the signal that ended it early, None without one.
    """

    step: int
    loss: float
    evaluation: Evaluation | None
    checkpoint: Path
    report: Path | None
    signal_number: int | None


class Trainer:
    """Trains, evaluates and samples the network that a configuration describes.

    Args:
        config: a RunConfig, or the path of a YAML.

    Raises:
        UserError: the configuration contradicts itself, or names files that do not exist.
    """

    def __init__(self, config: RunConfig | str | os.PathLike[str]) -> None:
        self.config = config if isinstance(config, RunConfig) else load_config(Path(config))
        check_config(self.config, world_size=int(os.environ.get("MS_WORKER_NUM", "1")))
        set_up_device(self.config)
        self._answering: LoadedModel | None = None

    def train(self) -> TrainResult:
        """Train until the last step, stop_at_step, SIGTERM or Ctrl-C; always ends with a save.

        Raises:
            UserError: the data or checkpoint does not fit, or output_dir holds another run.
            NotFiniteError: too many steps in a row had gradients that are not finite.
        """
        checkpoint = find_resume(self.config)
        if not self.config.resume_training:
            _require_fresh(self.config)
        _require_weights(self.config, checkpoint is not None)
        run = _TrainingRun(self.config)
        return run.run(run.restore(checkpoint) if checkpoint else 0)

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
        loader = build_loader(config, config.eval_dataset, training=False)
        network = build_network(without_adapters(config))
        evaluator = Evaluator(network, loader, config.eval_dataset.batch_size)
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
            self._answering = load_model(self.config)
        return predict(self._answering, [prompts] if isinstance(prompts, str) else prompts)


class _TrainingRun:
    """The objects of one run and its loop."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.loader = build_loader(config, config.train_dataset, training=True)
        self.plan = make_plan(
            config.runner_config, len(self.loader), config.train_dataset.data_loader.dataset_dir
        )
        self.network = build_network(config)
        self.base = base_of(config, self.network) if config.model.model_config.pet_config else None
        self.optimizer = build_optimizer(config, self.network)
        self.loss_scale = build_loss_scale(config.runner_wrapper.scale_sense)
        self.learning_rate = build_learning_rate(config, self.plan.total_steps)
        self.saver = Saver(
            config,
            self.network,
            self.optimizer,
            self.loss_scale,
            self.loader.fingerprint,
            self.base,
        )
        wrapper = config.runner_wrapper
        self.step_fn = TrainStep(
            self.network,
            self.optimizer,
            self.plan.accumulation,
            wrapper.max_grad_norm if wrapper.use_clip_grad else None,
        )
        self.evaluator = None
        if config.do_eval:
            loader = build_loader(config, config.eval_dataset, training=False)
            self.evaluator = Evaluator(self.network, loader, config.eval_dataset.batch_size)
        self.samples = build_samples(config, self.network, self.loader)
        self.evaluation: Evaluation | None = None
        self.resumed_step: int | None = None

    def restore(self, checkpoint: object) -> int:
        """Put a checkpoint's state in place; returns its step."""
        self.resumed_step = restore(
            checkpoint,
            self.config,
            self.network,
            self.optimizer,
            self.loss_scale,
            self.loader.fingerprint,
            self.base,
        )
        return self.resumed_step

    def run(self, step: int) -> TrainResult:
        """Train from `step` on."""
        self._announce(step)
        metrics = callback(self.config, MetricsWriterSection) or MetricsWriterSection()
        if self.plan.last_step <= step:
            get_logger().info("nothing to do: step %d of %d is done", step, self.plan.last_step)
        loss = float("nan")
        if self.samples:
            self.samples.before()
        # A run that was killed before its first checkpoint starts again: step 0 keeps no line.
        writer = MetricsWriter(metrics_path(self.config), tensorboard_folder(self.config), step)
        with StopRequest() as stop, writer, self.saver:
            self.monitor = self._new_monitor()
            steps = self.plan.micro_batches(self.loader, step)
            while step < self.plan.last_step and stop.signal_number is None:
                self.monitor.start_step()
                micro_batches = next(steps)
                step += 1
                loss = self._one_step(step, micro_batches, writer, metrics.per_layer_steps)
                if self._evaluation_due(step):
                    self._evaluate(step, writer)
                stop.listen()
                if self.saver.due(step):
                    self.saver.save(step)
            if step != self.resumed_step:
                self.saver.save(step)
        return self._finish(step, loss, stop.signal_number)

    def _one_step(
        self, step: int, micro_batches: list[Batch], writer: MetricsWriter, per_layer: int
    ) -> float:
        rate, scale = self.learning_rate(step - 1), self.loss_scale.value
        result = self.step_fn(
            micro_batches, rate, scale, lambda index: self._set_noise_keys(step, index)
        )
        self.loss_scale.update(result.skipped)
        record = self.monitor.record(step, result, rate, scale)
        if per_layer and step % per_layer == 0:
            record |= self.monitor.layer_fields(result)
        writer.write(record)
        monitor = callback(self.config, LossMonitorSection) or LossMonitorSection()
        if step % monitor.per_print_times == 0 or step == self.plan.last_step:
            get_logger().info(step_line(record, self.plan.last_step))
        self._stop_if_lost(step, micro_batches)
        return result.loss

    def _set_noise_keys(self, step: int, micro_batch: int) -> None:
        """Another noise for each micro batch, the same after a resume."""
        number = step * self.plan.accumulation + micro_batch
        key = float((self.config.seed * 7919 + number) % 100003)
        if self.config.moe_config.router_jitter > 0:
            for layer in self.network.model.layers:
                router = layer.feed_forward.routed_experts.router
                router.jitter_key.set_data(mindspore.Tensor(key, mindspore.float32))
        if self.base:
            set_dropout_keys(self.network, key)

    def _stop_if_lost(self, step: int, micro_batches: list[Batch]) -> None:
        limit = self.config.runner_wrapper.max_skipped_steps
        if self.loss_scale.skipped_in_a_row < limit:
            return
        where = first_non_finite(self.step_fn, micro_batches)
        raise NotFiniteError(
            f"{limit} steps in a row, up to step {step}, had gradients that are not finite "
            f"(loss scale {self.loss_scale.value:g}); first not finite is {where}. Resume from "
            "an earlier checkpoint with a lower learning rate, or compute in another dtype"
        )

    def _evaluation_due(self, step: int) -> bool:
        if self.evaluator is None:
            return False
        by_step, by_epoch = self.config.eval_step_interval, self.config.eval_epoch_interval
        if by_step > 0 and step % by_step == 0:
            return True
        ends_epoch = self.plan.ends_epoch(step)
        due = by_epoch > 0 and ends_epoch and self.plan.epoch_of(step) % by_epoch == 0
        return due or step == self.plan.total_steps

    def _evaluate(self, step: int, writer: MetricsWriter) -> None:
        self.evaluation = result = self.evaluator()
        get_logger().info(
            "eval at step %d: loss %.4f  perplexity %.2f  over %d tokens in %.1f s",
            step,
            result.loss,
            result.perplexity,
            result.tokens,
            result.seconds,
        )
        writer.write(
            {
                "kind": "eval",
                "step": step,
                "loss": result.loss,
                "perplexity": result.perplexity,
                "tokens": result.tokens,
                "eval_seconds": result.seconds,
            }
        )

    def _new_monitor(self) -> StepMonitor:
        runner, model = self.config.runner_config, self.config.model.model_config
        return StepMonitor(
            model,
            self.config.context.device_target,
            runner.batch_size * self.plan.accumulation * model.seq_length,
            self.plan.last_step,
            self.config.runner_config.peak_tflops,
        )

    def _announce(self, step: int) -> None:
        config, plan = self.config, self.plan
        folder = Path(config.output_dir)
        with write_aside(folder / "config.yaml") as aside:
            aside.write_text(render_config(config), encoding="utf-8")
        moe = config.moe_config
        get_logger().info(
            "%s, %s kernels, %s; aux loss %s, z loss %s",
            trained_text(self.network),
            self.network.kernel_name,
            "dropless" if moe.dropless else f"capacity factor {moe.capacity_factor:g}",
            f"x {moe.aux_loss_factor:g}" if moe.aux_loss_factor else "off",
            f"x {moe.z_loss_factor:g}" if moe.z_loss_factor else "off",
        )
        get_logger().info(
            "steps %d to %d of %d, %d an epoch; compiling the graph at the first one",
            step + 1,
            plan.last_step,
            plan.total_steps,
            plan.steps_per_epoch,
        )

    def _finish(self, step: int, loss: float, signal_number: int | None) -> TrainResult:
        root, report = checkpoint_root(self.config), None
        resume = "the same command with --resume_training True"
        if signal_number is not None:
            name = signal.Signals(signal_number).name
            get_logger().info("stopped by %s after step %d; to go on: %s", name, step, resume)
        if self.samples and signal_number is None:
            self.samples.after()
        section = callback(self.config, ReportSection) or ReportSection()
        if section.enabled and signal_number is None:
            report = write_report(
                self.config.output_dir, render_config(self.config), metrics_path(self.config)
            )
            get_logger().info("report: %s", report)
        if step < self.plan.total_steps and signal_number is None:
            get_logger().info("stopped at step %d as asked; to go on: %s", step, resume)
        weights = str(root)
        if self.base:
            weights = f"{self.config.load_checkpoint} --set adapter={root}"
            get_logger().info("for peft: %s", save_peft(self.config, self.network))
        get_logger().info(
            "checkpoints: %s; to evaluate: --run_mode eval --load_checkpoint %s", root, weights
        )
        return TrainResult(step, loss, self.evaluation, root, report, signal_number)


def _require_weights(config: RunConfig, resumed: bool) -> None:
    """Fine-tuning starts from weights, and adapters are never without them."""
    adapters = config.model.model_config.pet_config is not None
    if not config.load_checkpoint and (adapters or (config.run_mode == "finetune" and not resumed)):
        why = "LoRA trains adapters" if adapters else "run_mode finetune starts"
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
