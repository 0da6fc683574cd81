"""All measurements of one model on one set of samples."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from periln.eval.bounds.certificate import certify
from periln.eval.stability.attention import AttentionProbe
from periln.eval.stability.backward import backward_rows, shared_between_layers
from periln.eval.stability.fits import fit_growth
from periln.eval.stability.massive import massive_activations, outlier
from periln.eval.stability.overflow import first_non_finite
from periln.eval.stability.plan import Options, Part, Plan, samples_at_once, samples_backward
from periln.eval.stability.probe import Probe
from periln.eval.stability.redundancy import skip_losses, staged_skip_losses
from periln.eval.stability.verdict import checkpoint_verdict, depth_profile
from periln.eval.structure.anatomy import Anatomy, find_anatomy
from periln.eval.structure.stages import Stages, find_stages
from periln.eval.structure.words import describe
from periln.eval.texts.samples import Samples
from periln.eval.texts.windows import token_loss
from periln.runkit.folder import json_number
from periln.runkit.process import peak_rss, return_freed_memory

COLUMNS = ["step", "layer", "sublayer", "tensor", "stat", "value"]
ANGLE_COLUMNS = ["step", "layer", "other", "value"]
PROFILES = ("variance", "variance_data", "mean_abs", "max_abs")


@dataclass(frozen=True)
class Measured:
    """The tables of one checkpoint, its entry in stability.json, and what its weights alone say about FP16.

    `stopped`: the part in which it was interrupted and after which nothing was measured, or None.
    """

    rows: pd.DataFrame
    angles: pd.DataFrame
    record: dict[str, Any]
    certificate: dict[str, Any] | None = None
    stopped: str | None = None


class _Measurement:
    """The parts of a measurement, each of which adds to what is known."""

    def __init__(self, model: nn.Module, samples: Samples, options: Options, step: int, in_place: bool, plan: Plan):
        self.model, self.samples, self.options, self.step = model, samples, options, step
        self.in_place, self.plan = in_place, plan
        self.anatomy: Anatomy = find_anatomy(model)
        self.stages: Stages | None = find_stages(self.anatomy)
        self.device = next(model.parameters()).device
        self.probe, self.attention = Probe(self.anatomy, options.angles), AttentionProbe(self.anatomy)
        self.rows: list[tuple] = []
        self.fp16: dict[str, Any] | None = None
        self.certificate: dict[str, Any] | None = None

    def batches(self, size: int, limit: int | None = None) -> list[torch.Tensor]:
        """Batches of at most `size` samples whose logits are at most `LOGITS` numbers."""
        rows = samples_at_once(self.anatomy, self.samples.ids.shape[1])
        return list(self.samples.batches(min(size, rows), self.device, limit))

    @torch.no_grad()
    def forward(self, part: Part) -> None:
        first = 0
        with self.probe as probe, self.attention:
            for ids in self.batches(self.options.batch_size):
                probe.start(first)
                probe.finish(self.model(input_ids=ids, use_cache=False).logits, ids)
                first += len(ids)
                part.done(len(ids) / len(self.samples.ids))

    def certify(self, part: Part) -> None:
        peaks = {row[1:4]: row[5] for row in self.probe.rows(self.step) if row[4] == "max_abs"}
        of = len(self.anatomy.sublayers) + 2
        self.certificate = certify(self.model, peaks, self.anatomy, lambda: part.done(1 / of))

    def backward(self, part: Part) -> None:
        size = samples_backward(self.options, self.anatomy, self.samples.ids.shape[1])
        batches = self.batches(size, self.options.backward_samples)
        of = len(batches) * (self.anatomy.num_layers + 1)
        self.rows += backward_rows(self.anatomy, batches, self.step, self.stages, lambda: part.done(1 / of))

    def skips(self, part: Part) -> None:
        layers, tokens = self.anatomy.num_layers, self.options.skip_tokens
        batches = [ids[:, :tokens] for ids in self.batches(self.options.batch_size, self.options.skip_samples)]
        if self.stages is not None:
            whole = len(batches) * layers * (layers + 1) / 2  # later layers have fewer after them
            tell = lambda layer: part.done((layers + 1 - layer) / whole)  # noqa: E731
            self.rows += staged_skip_losses(self.stages, batches, self.step, tell)
            return

        @torch.no_grad()
        def loss() -> float:
            total, count = 0.0, 0
            for ids in batches:
                total += token_loss(self.model(input_ids=ids, use_cache=False).logits, ids).double().item()
                count += ids[:, 1:].numel()
            return total / count

        self.rows += skip_losses(self.anatomy, loss, self.step, lambda: part.done(1 / layers))

    def in_fp16(self, part: Part) -> None:
        """On the samples that hold the peaks of the stream and the branches, then on the first ones.

        One at a time, since each needs memory for its graph and for the gradient of its logits. What is reported as
        first is the first in the first of these samples that overflows.
        """
        peaks = sorted((m.peak for m in self.probe.moments.values() if m.peak.sample >= 0), key=lambda p: -p.value)
        count = self.options.fp16_samples
        chosen = list(dict.fromkeys([*(p.sample for p in peaks[:2]), *range(len(self.samples.ids))]))[:count]
        batches = [self.samples.ids[[number]].to(self.device) for number in chosen]
        scale, each = self.options.loss_scale, 1 / (4 * len(batches))
        self.fp16 = first_non_finite(self.anatomy, batches, scale, self.in_place, lambda: part.done(each))

    def run(self) -> str | None:
        """Run every part of the plan; returns the one in which it was interrupted.

        Raises:
            KeyboardInterrupt: before anything was measured.
        """
        for part in self.plan.parts:
            try:
                return_freed_memory()  # the text's tokens, and what the part before needed
                getattr(self, part.does)(part)
                part.finish()
            except KeyboardInterrupt:
                if not self.probe.predicted:
                    raise
                return part.name
        return None

    def measured(self, started: float, token_text: Callable[[int], str | None], stopped: str | None) -> Measured:
        probe, anatomy = self.probe, self.anatomy
        rows = [*probe.rows(self.step), *self.attention.rows(self.step), *self.rows]
        table = pd.DataFrame(rows, columns=COLUMNS).astype({"value": "float64"})

        def token_of(sample: int, position: int) -> dict[str, Any]:
            token = int(self.samples.ids[sample, position])
            return {"token_id": token, "token": token_text(token)}

        fits = {stat: fit_growth((p := depth_profile(table, stat)).index, p) for stat in PROFILES}
        fp16 = self.fp16
        record: dict[str, Any] = {
            "step": self.step,
            "placement": anatomy.placement,
            "structure": describe(anatomy),
            "num_layers": anatomy.num_layers,
            "hidden_size": anatomy.hidden_size,
            "loss": probe.loss,
            "predicted_tokens": probe.predicted,
            "stopped": stopped,
            "fits": fits,
            "massive_activations": massive_activations(probe, token_of),
            "outlier": outlier(probe),
            "fp16": fp16,
            "first_non_finite": None if fp16 is None else {k: fp16[k] for k in ("forward", "backward")},
            "seconds": round(time.monotonic() - started, 2),
            "peak_rss_bytes": peak_rss(),
        }
        record["verdict"] = [*checkpoint_verdict(record, table), f"Its norms, as found: {record['structure']}."]
        if stopped is not None:
            record["verdict"].append(f"Stopped in the part {stopped!r}: what comes after it was not measured.")
        angles = pd.DataFrame(probe.angles.rows(self.step), columns=ANGLE_COLUMNS)
        return Measured(table, angles, json_number(record), self.certificate, stopped)


def measure(
    model: nn.Module,
    samples: Samples,
    options: Options | None = None,
    step: int = 0,
    token_text: Callable[[int], str | None] = lambda token: None,
    tell: Callable[[Plan], None] = lambda plan: None,
    in_place: bool = False,
) -> Measured:
    """Measure a causal LM on samples; the model is left as it was, in evaluation mode.

    Args:
        tell: called with the plan once it is known how long a pass takes, and each time that more of it is done.
        in_place: the model may be left in FP16, which spares a copy of it.

    An interruption (Ctrl-C) ends it with what was measured, from the first batch on.

    Raises:
        UserError: its residual stream cannot be found.
    """
    options, started = options or Options(), time.monotonic()
    model.eval()
    plan = Plan.of(options, samples, tell)
    measurement = _Measurement(model, samples, options, step, in_place, plan)
    staged = measurement.stages is not None
    by_layer = staged and not shared_between_layers(measurement.anatomy)
    plan.measure(measurement.anatomy, samples, staged, by_layer, in_place, options)
    return measurement.measured(started, token_text, measurement.run())
