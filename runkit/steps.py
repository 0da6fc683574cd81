"""The record of a training step, declared once: what both trainers write to metrics.jsonl, and all readers read."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any


def _of(unit: str, **more: Any) -> Any:
    return field(metadata={"unit": unit}, **more)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One line of metrics.jsonl. A number that is not finite is None, since JSON has no NaN.

    From `tokens_per_second` on, a clock or an allocator decides: two runs differ in these.
    """

    step: int = _of("from 0")
    loss: float | None = _of("nats a token")
    learning_rate: float = _of("1")
    grad_norm: float | None = _of("global L2 norm before clipping, without the loss scale")
    loss_scale: float = _of("1")
    found_inf: bool = _of("whether the optimizer skipped the step")
    skip_kind: str | None = _of("forward, probe or backward")
    skips_consecutive: int = _of("steps")
    skips_total: int = _of("steps")
    tokens: int = _of("tokens since the start of the run")
    tokens_per_second: float = _of("tokens a second, over all processes")
    step_seconds: float = _of("seconds")
    data_wait: float | None = _of("share of the step")
    mfu: float | None = _of("share of the device's peak")
    peak_memory_bytes: int | None = _of("bytes")
    skip_module: str | None = _of("name of the first module whose output was not finite", default=None)
    spike: bool | None = _of(
        "whether the gradient norm is a spike by the recipe's rule; left out if None", default=None
    )
    heldout_loss: float | None = _of("nats a token; left out if None", default=None)
    distillation: float | None = _of("KL(distill_from || model), nats a token; left out if None", default=None)

    def as_json(self) -> dict[str, Any]:
        """The mapping that is written."""
        left_out = {name for name in ("spike", "heldout_loss", "distillation") if getattr(self, name) is None}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}


STEP_FIELDS = tuple(f.name for f in fields(StepRecord))


def finite(x: float) -> float | None:
    """The number, or None for NaN and the infinities."""
    return float(x) if math.isfinite(x) else None


def final_loss(losses: Iterable[float | None]) -> float:
    """Mean of the finite losses in the last tenth of the recorded steps, nats a token; NaN where there is none."""
    every = list(losses)
    last = [x for x in every[-max(1, math.ceil(len(every) / 10)) :] if x is not None and math.isfinite(x)]
    return math.fsum(last) / len(last) if last else math.nan
