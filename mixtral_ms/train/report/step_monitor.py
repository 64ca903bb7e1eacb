"""What a step is reported as: a record for metrics.jsonl and a line for the log."""

import math
import time
from collections import deque
from statistics import median
from typing import Any

from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.train.report.flops import Mfu, flops_per_token, mfu, peak_flops
from mixtral_ms.train.step.totals import StepResult

_ETA_WINDOW = 20  # steps whose median time the remaining time is told from


class StepMonitor:
    """Times steps and describes them.

    Args:
        config: the network, for its FLOPs a token.
        device_target: whose peak the MFU is a share of.
        tokens_per_step: positions that a step computes on all ranks, supervised or not.
        last_step: where this run ends.
        peak_tflops: the device's peak in TFLOP/s where it is known.
        devices: how many share the work.
    """

    def __init__(
        self,
        config: MixtralConfig,
        device_target: str,
        tokens_per_step: int,
        last_step: int,
        peak_tflops: float | None = None,
        devices: int = 1,
    ) -> None:
        self.tokens_per_step, self.last_step = tokens_per_step, last_step
        self.token_flops = flops_per_token(config, config.seq_length)["total"]
        self.peak, self.devices = peak_flops(device_target, peak_tflops), devices
        self._recent: deque[float] = deque(maxlen=_ETA_WINDOW)
        self._started = self._paused = time.perf_counter()

    def start_step(self) -> None:
        """Begin to time a step."""
        self._started = self._paused = time.perf_counter()

    def pause(self) -> None:
        """Its data is there; what is done before it goes on is no part of it."""
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Time on."""
        self._started += time.perf_counter() - self._paused

    def record(
        self, step: int, result: StepResult, learning_rate: float, loss_scale: float
    ) -> dict[str, Any]:
        """The step's record (fields as train/metrics.py says)."""
        seconds = time.perf_counter() - self._started
        self._recent.append(seconds)
        rate = self.tokens_per_step / seconds
        record = {
            "kind": "train",
            "step": step,
            "loss": result.loss,
            **result.parts,
            "learning_rate": learning_rate,
            "grad_norm": result.grad_norm,
            "loss_scale": loss_scale,
            "skipped": result.skipped,
            "tokens": result.tokens,
            "tokens_per_second": rate,
            "step_time_ms": 1000 * seconds,
            "eta_seconds": median(self._recent) * (self.last_step - step),
        }
        if self.peak is not None:
            share = mfu(rate, self.token_flops, self.peak, self.devices)
            record["mfu"] = share.ratio
            record["achieved_flops_per_second"] = share.achieved_flops_per_second
            record["peak_flops_per_second"] = share.peak_flops_per_second
        return record

    @staticmethod
    def layer_fields(result: StepResult) -> dict[str, Any]:
        """The per-layer part of the record."""
        return {
            "expert_load": result.expert_load,
            "drop_percent": result.drop_percent,
            "router_entropy": result.router_entropy,
        }


def step_line(record: dict[str, Any], last_step: int) -> str:
    """One log line of a record."""
    parts = [
        f"step {record['step']}/{last_step}",
        f"loss {record['loss']:.4f}",
        f"aux {record['aux_loss']:.4f}",
        f"lr {record['learning_rate']:.3g}",
        f"norm {record['grad_norm']:.3f}",
    ]
    if record["z_loss"]:
        parts.insert(3, f"z {record['z_loss']:.4f}")
    if record["loss_scale"] != 1:
        parts.append(f"scale {record['loss_scale']:g}")
    if record["skipped"]:
        parts.append("SKIPPED (gradients not finite)")
    if any(record.get("drop_percent", ())):
        parts.append(f"dropped up to {max(record['drop_percent']):.1f}%")
    parts += [
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['step_time_ms']:.0f} ms",
        f"eta {_duration(record['eta_seconds'])}",
    ]
    if "mfu" in record:
        share = Mfu(record["achieved_flops_per_second"], record["peak_flops_per_second"])
        parts.append(f"mfu {share}")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
