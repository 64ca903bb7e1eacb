"""One training run: its objects, its loop, and what it says of itself.

Every rank goes through the same steps; the first one alone writes metrics, samples and the report.
"""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mindspore

from mixtral_ms.checkpoint.reshard.open_checkpoint import OpenedSource
from mixtral_ms.checkpoint.store.store import CheckpointError
from mixtral_ms.config import RunConfig
from mixtral_ms.config.loading.render import render_config
from mixtral_ms.config.loading.resolve import dataset_of
from mixtral_ms.config.sections.training_section import (
    LossMonitorSection,
    MetricsWriterSection,
    ReportSection,
)
from mixtral_ms.convert.adapters.lora_weights import fingerprint_of
from mixtral_ms.data.conversations.chat_template import CHAT_TEMPLATE_KEY
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.files import write_aside
from mixtral_ms.log import get_logger
from mixtral_ms.model.lora import set_dropout_keys
from mixtral_ms.parallel.comm.process_groups import gather_objects
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.announcement import announce
from mixtral_ms.train.builders import (
    build_eval_loader,
    build_learning_rate,
    build_loader,
    build_monitor,
    build_network,
    build_optimizer,
    build_samples,
    build_train_step,
    callback,
    metrics_path,
    open_network_weights,
    tensorboard_folder,
)
from mixtral_ms.train.evaluation import Evaluation, Evaluator
from mixtral_ms.train.objectives.causal_lm import CausalLMObjective
from mixtral_ms.train.objectives.objective import MakeObjective
from mixtral_ms.train.report.metrics import MetricsWriter, NoMetrics, read_metrics
from mixtral_ms.train.report.report import write_report
from mixtral_ms.train.report.step_monitor import step_line
from mixtral_ms.train.state.lora_run import base_of, save_peft
from mixtral_ms.train.state.rank_agreement import StepSync, Storage, require_same_on_all_ranks
from mixtral_ms.train.state.resume import restore
from mixtral_ms.train.state.run_facts import TrainingFacts, data_state
from mixtral_ms.train.state.saver import Saver, checkpoint_root, write_strategy_files
from mixtral_ms.train.step.loss_scale import build_loss_scale
from mixtral_ms.train.step.non_finite import first_non_finite
from mixtral_ms.train.step_plan import plan_steps
from mixtral_ms.train.stop_signals import StopRequest

_TO_GO_ON = "the same command with --resume_training True"


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
        report: the report, None when it is switched off, the run goes on later, or another rank
            wrote it.
        signal_number: the signal that ended it early, None without one.
    """

    step: int
    loss: float
    evaluation: Evaluation | None
    checkpoint: Path
    report: Path | None
    signal_number: int | None


class TrainingRun:
    """The objects of one run and its loop.

    Args:
        config: the run.
        mesh: this rank among those of the run.
        checkpoint: what it goes on from; None starts at step 0.
        objective: what it makes smaller.

    Raises:
        UserError: data, weights or checkpoint do not fit, or are others on another rank.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        storage: Storage,
        checkpoint: OpenedSource | None,
        objective: MakeObjective = CausalLMObjective,
    ) -> None:
        self.config, self.mesh, self.leads = config, mesh, mesh.rank == 0
        self.storage = storage
        data = dataset_of(config, training=True)
        self.loader = build_loader(config, data, mesh, training=True)
        data_dir = data.data_loader.dataset_dir
        self.plan = plan_steps(config.runner_config, len(self.loader), data_dir, mesh.grid)
        eval_loader = build_eval_loader(config, mesh, self.loader) if config.do_eval else None
        self._require_same_files(eval_loader.fingerprint if eval_loader else None, checkpoint)
        self.network = build_network(config, mesh, values="restored" if checkpoint else "initial")
        self.base = base_of(config, self.network, resumed=checkpoint is not None)
        self.optimizer = build_optimizer(config, self.network)
        self.loss_scale = build_loss_scale(config.runner_wrapper.scale_sense)
        self.learning_rate = build_learning_rate(config, self.plan.total_steps)
        self.data = data_state(config, self.loader)
        self.training = TrainingFacts(config, self.plan.total_steps, self.learning_rate)
        self.saver = Saver(
            config,
            self.network,
            self.optimizer,
            self.loss_scale,
            self.data,
            self.training,
            self._further_state(),
            storage,
        )
        self.step_fn = build_train_step(config, self.network, self.optimizer, objective)
        self.evaluator = None
        if eval_loader:
            rows = eval_loader.batch_size
            self.evaluator = Evaluator(self.network, eval_loader, rows, objective)
            self.evaluator.require_targets()
        self.samples = build_samples(config, self.network)
        self.step_sync = StepSync(mesh)
        self.evaluation: Evaluation | None = None
        self.resumed_step = self._restore(checkpoint) if checkpoint else None
        self.done, self._updates = self.resumed_step or 0, self.optimizer.updates
        self._told_of_no_target = False

    def _further_state(self) -> dict[str, object]:
        """What a checkpoint says beside how to go on: what it is for, and what asks it."""
        template = self.loader.data.facts.get(CHAT_TEMPLATE_KEY)
        return {
            **({"base": self.base} if self.base else {}),
            **({CHAT_TEMPLATE_KEY: dict(template)} if template else {}),
        }

    def _require_same_files(self, evaluated: str | None, checkpoint: OpenedSource | None) -> None:
        if self.mesh.world.size == 1:
            return
        weights = open_network_weights(self.config) if self.config.load_checkpoint else None
        facts = {
            "fingerprint of train_dataset": self.loader.fingerprint,
            "fingerprint of eval_dataset": evaluated,
            "fingerprint of load_checkpoint": fingerprint_of(weights) if weights else None,
            "checkpoint": checkpoint and (checkpoint.folder.name, checkpoint.state),
        }
        require_same_on_all_ranks(self.mesh.world, facts)

    def _restore(self, checkpoint: OpenedSource) -> int:
        step = restore(
            checkpoint,
            self.config,
            self.network,
            self.optimizer,
            self.loss_scale,
            self.data,
            self.base,
        )
        if saved := checkpoint.state.get("training"):
            self.training.say_what_changed(saved, step)
        return step

    def run(self) -> TrainResult:
        """Train from the step of the checkpoint on, or from the first."""
        step = self.resumed_step or 0
        self._announce(step)
        if self.plan.last_step <= step:
            get_logger().info("nothing to do: step %d of %d is done", step, self.plan.last_step)
        self.loss, ended_by = float("nan"), None
        if self.samples:
            self.samples.before()
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            writer = stack.enter_context(contextlib.closing(self._metrics_writer(step)))
            stack.enter_context(contextlib.closing(self.saver))
            self.monitor = build_monitor(self.config, self.mesh, self.plan.last_step)
            with self._saved_on_error():
                ended_by = self._train(step, stop, writer)
        self.step_sync.wait()  # who leaves earlier is taken for failed, and the others are ended
        return self._finish(self.done, self.loss, ended_by)

    def _train(self, step: int, stop: StopRequest, writer: MetricsWriter | NoMetrics) -> int | None:
        """The steps behind `step`; returns the signal that ended them early, None without one."""
        steps = self.plan.micro_batches(self.loader, step)
        if self.evaluator and self._owes_evaluation(step):
            self._evaluate(self.evaluator, step, writer)
        micro_batches, ended_by = self._next_step(steps, stop)
        while step < self.plan.last_step and ended_by is None:
            step += 1
            self._one_step(step, micro_batches, writer)
            stop.listen()
            micro_batches, ended_by = self._next_step(steps, stop)
            if self.evaluator and ended_by is None and self._evaluation_due(step):
                self._evaluate(self.evaluator, step, writer)
                stop.listen()
                ended_by, _, _ = self.step_sync(stop.signal_number, False)
        if self.done != self.resumed_step:
            self.saver.save(self.done)
        return ended_by

    def _next_step(
        self, steps: Iterator[list[Batch]], stop: StopRequest
    ) -> tuple[list[Batch], int | None]:
        """Between two steps: the data of the next one, what ended the run, and a due checkpoint.

        It is saved before what comes then, evaluation and reading errors included.
        """
        error, micro_batches = None, []
        if self.done < self.plan.last_step:
            self.monitor.start_step()
            try:
                micro_batches = next(steps)
            except Exception as found:  # noqa: BLE001 - of any kind, it is raised behind the save
                error = found
            self.monitor.pause()
        time_is_up = self.saver.time_is_up()
        ended_by, time_to_save, failed = self.step_sync(stop.signal_number, time_is_up, error)
        last = self.done == self.plan.last_step or ended_by is not None or failed
        if self.done != (self.resumed_step or 0) and (
            last or time_to_save or self.saver.due(self.done)
        ):
            self.saver.save(self.done)
        if failed:
            self._say_what_is_saved()
            self.step_sync.raise_error(error)
        return micro_batches, ended_by

    @contextlib.contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Save the steps that are done when something else than training itself fails.

        Of several ranks each would wait for the others: they save what is due, and what fails on
        all of them.
        """
        try:
            yield
        except (NotFiniteError, CheckpointError):
            raise  # their weights, or what is saved, are better as they are
        except Exception:
            whole = self.optimizer.updates == self._updates
            new = self.done not in (self.resumed_step or 0, self.saver.saved_step)
            if whole and new and self.mesh.world.size == 1:
                try:
                    self.saver.save(self.done)
                except Exception as error:  # noqa: BLE001 - the first error is the one to raise
                    get_logger().warning("step %d cannot be saved: %s", self.done, error)
                else:
                    self._say_what_is_saved()
            raise

    def _say_what_is_saved(self) -> None:
        if self.saver.saved_step is not None:
            get_logger().info(
                "an error ends the run; step %d is saved: when it is mended, %s goes on",
                self.saver.saved_step,
                _TO_GO_ON,
            )

    def _metrics_writer(self, step: int) -> MetricsWriter | NoMetrics:
        """A run that was killed before its first checkpoint starts again: step 0 keeps no line."""
        if not self.leads:
            return NoMetrics()
        return MetricsWriter(metrics_path(self.config), tensorboard_folder(self.config), step)

    def _one_step(
        self, step: int, micro_batches: list[Batch], writer: MetricsWriter | NoMetrics
    ) -> None:
        self.monitor.go_on()
        rate, scale = self.learning_rate(step - 1), self.loss_scale.value
        result = self.step_fn(
            micro_batches, rate, scale, lambda index: self._set_noise_keys(step, index)
        )
        self.loss_scale.update(result.skipped)
        self.loss = result.loss
        self.done, self._updates = step, self.optimizer.updates
        if not result.tokens and not self._told_of_no_target:
            self._told_of_no_target = True
            get_logger().warning(
                "step %d has no target: its labels are all ignore_token_id or pad_token_id, and "
                "what it trains are the routers' losses; such steps have tokens 0 in the metrics",
                step,
            )
        record = self.monitor.record(step, result, rate, scale)
        metrics = callback(self.config, MetricsWriterSection) or MetricsWriterSection()
        if metrics.per_layer_steps and step % metrics.per_layer_steps == 0:
            record |= self.monitor.layer_fields(result)
        writer.write(record)
        monitor = callback(self.config, LossMonitorSection) or LossMonitorSection()
        if step % monitor.per_print_times == 0 or step == self.plan.last_step:
            get_logger().info(step_line(record, self.plan.last_step))
        self._stop_if_lost(step, micro_batches)

    def _set_noise_keys(self, step: int, micro_batch: int) -> None:
        """Another noise for each micro batch, the same after a resume and on any layout."""
        parts = self.mesh.grid.data_parallel
        number = (step * self.plan.accumulation + micro_batch) * parts + self.mesh.data_index
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
        by_step, by_epoch = self.config.eval_step_interval, self.config.eval_epoch_interval
        if by_step > 0 and step % by_step == 0:
            return True
        ends_epoch = self.plan.ends_epoch(step)
        due = by_epoch > 0 and ends_epoch and self.plan.epoch_of(step) % by_epoch == 0
        return due or step == self.plan.total_steps

    def _owes_evaluation(self, step: int) -> bool:
        """Whether the run was stopped between the step that is resumed and its evaluation."""
        path, kinds = metrics_path(self.config), set()
        if self.leads and self.resumed_step and path.exists():
            kinds = {record["kind"] for record in read_metrics(path) if record["step"] == step}
        return self._evaluation_due(step) and gather_objects(self.mesh.world, kinds == {"train"})[0]

    def _evaluate(self, evaluator: Evaluator, step: int, writer: MetricsWriter | NoMetrics) -> None:
        self.evaluation = result = evaluator()
        get_logger().info(
            "eval at step %d: loss %.4f  perplexity %.2f  over %d tokens in %.1f s",
            step,
            result.loss,
            result.perplexity,
            result.tokens,
            result.seconds,
        )
        writer.write(result.record(step))

    def _announce(self, step: int) -> None:
        config, plan = self.config, self.plan
        if self.leads:
            with write_aside(Path(config.output_dir) / "config.yaml") as aside:
                aside.write_text(render_config(config), encoding="utf-8")
        if self.leads or self.storage.leads:
            write_strategy_files(config, self.network)
        announce(config, plan, self.network, self.loader, step)

    def _finish(self, step: int, loss: float, signal_number: int | None) -> TrainResult:
        root, report, resume = checkpoint_root(self.config), None, _TO_GO_ON
        if signal_number is not None:
            name = signal.Signals(signal_number).name
            get_logger().info("stopped by %s after step %d; to go on: %s", name, step, resume)
        if self.samples and signal_number is None:
            self.samples.after()
        section = callback(self.config, ReportSection) or ReportSection()
        if section.enabled and signal_number is None and self.leads:
            report = write_report(
                self.config.output_dir, render_config(self.config), metrics_path(self.config)
            )
            get_logger().info("report: %s", report)
        if step < self.plan.total_steps and signal_number is None:
            get_logger().info("stopped at step %d as asked; to go on: %s", step, resume)
        weights = str(root)
        if self.base:
            weights = f"{self.config.load_checkpoint} --set adapter={root}"
            if self.leads and not self.storage.hosts:
                get_logger().info("for peft: %s", save_peft(self.config, root))
        get_logger().info(
            "checkpoints: %s; to evaluate: --run_mode eval --load_checkpoint %s", root, weights
        )
        return TrainResult(step, loss, self.evaluation, root, report, signal_number)
