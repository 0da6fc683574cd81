"""All measurements of one model on one set of samples."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from periln.eval.stability.attention import AttentionProbe
from periln.eval.stability.backward import backward_rows
from periln.eval.stability.fits import fit_growth
from periln.eval.stability.massive import massive_activations, outlier
from periln.eval.stability.overflow import first_non_finite
from periln.eval.stability.probe import Probe
from periln.eval.stability.redundancy import skip_losses
from periln.eval.stability.verdict import checkpoint_verdict, depth_profile
from periln.eval.structure.anatomy import Anatomy, find_anatomy
from periln.eval.structure.words import describe
from periln.eval.texts.samples import Samples
from periln.eval.texts.windows import token_loss
from periln.runkit.folder import json_number
from periln.runkit.process import peak_rss

COLUMNS = ["step", "layer", "sublayer", "tensor", "stat", "value"]
ANGLE_COLUMNS = ["step", "layer", "other", "value"]
PROFILES = ("variance", "variance_data", "mean_abs", "max_abs")


@dataclass(frozen=True)
class Options:
    """How much is measured; a number of samples of 0 leaves that part out."""

    batch_size: int = 4
    angles: int | None = None
    backward_samples: int = 32
    skip_samples: int = 16
    fp16_samples: int = 4
    loss_scale: float = 1.0

    def asked(self) -> dict[str, Any]:
        """What decides the result (the batch size does not)."""
        return {k: v for k, v in asdict(self).items() if k != "batch_size"}


@dataclass(frozen=True)
class Measured:
    """The tables of one checkpoint, and its entry in stability.json."""

    rows: pd.DataFrame
    angles: pd.DataFrame
    record: dict[str, Any]


def units(anatomy_layers: int, samples: Samples, options: Options) -> int:
    """How many ticks a measurement gives to its progress bar."""
    skips = anatomy_layers if options.skip_samples else 0
    return len(samples.ids) + skips + bool(options.backward_samples) + bool(options.fp16_samples)


@torch.no_grad()
def _forward(anatomy: Anatomy, samples: Samples, options: Options, step: int, tick: Callable[[int], None]):
    device = next(anatomy.model.parameters()).device
    first = 0
    with Probe(anatomy, options.angles) as probe, AttentionProbe(anatomy) as attention:
        for ids in samples.batches(options.batch_size, device):
            probe.start(first)
            probe.finish(anatomy.model(input_ids=ids, use_cache=False).logits, ids)
            first += len(ids)
            tick(len(ids))
    return probe, [*probe.rows(step), *attention.rows(step)]


def _skips(anatomy: Anatomy, samples: Samples, options: Options, step: int, tick: Callable[[int], None]) -> list[tuple]:
    device = next(anatomy.model.parameters()).device

    @torch.no_grad()
    def loss() -> float:
        total, count = 0.0, 0
        for ids in samples.batches(options.batch_size, device, options.skip_samples):
            total += token_loss(anatomy.model(input_ids=ids, use_cache=False).logits, ids).double().item()
            count += ids[:, 1:].numel()
        return total / count

    return skip_losses(anatomy, loss, step, lambda: tick(1))


def _hardest(probe: Probe, samples: Samples, count: int, device: Any) -> list[torch.Tensor]:
    """The first samples, and before them the ones that hold the peaks of the stream and the branches."""
    peaks = sorted((m.peak for m in probe.moments.values() if m.peak.sample >= 0), key=lambda p: -p.value)
    chosen = list(dict.fromkeys([*(p.sample for p in peaks[:2]), *range(len(samples.ids))]))[:count]
    return [samples.ids[chosen].to(device)]


def measure(
    model: nn.Module,
    samples: Samples,
    options: Options | None = None,
    step: int = 0,
    token_text: Callable[[int], str | None] = lambda token: None,
    tick: Callable[[int], None] = lambda n: None,
) -> Measured:
    """Measure a causal LM on samples; the model is left as it was, in evaluation mode.

    Raises:
        UserError: its residual stream cannot be found.
    """
    options, started = options or Options(), time.monotonic()
    model.eval()
    anatomy = find_anatomy(model)
    device = next(model.parameters()).device
    probe, rows = _forward(anatomy, samples, options, step, tick)
    if options.backward_samples:
        size = max(1, options.batch_size // 2)
        rows += backward_rows(anatomy, list(samples.batches(size, device, options.backward_samples)), step)
        tick(1)
    if options.skip_samples:
        rows += _skips(anatomy, samples, options, step, tick)
    fp16 = None
    if options.fp16_samples:
        batches = _hardest(probe, samples, options.fp16_samples, device)
        fp16 = first_non_finite(anatomy, batches, options.loss_scale)
        tick(1)
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"value": "float64"})

    def token_of(sample: int, position: int) -> dict[str, Any]:
        token = int(samples.ids[sample, position])
        return {"token_id": token, "token": token_text(token)}

    fits = {stat: fit_growth((p := depth_profile(table, stat)).index, p) for stat in PROFILES}
    record = {
        "step": step,
        "placement": anatomy.placement,
        "structure": describe(anatomy),
        "num_layers": anatomy.num_layers,
        "hidden_size": anatomy.hidden_size,
        "loss": probe.loss,
        "predicted_tokens": probe.predicted,
        "fits": fits,
        "massive_activations": massive_activations(probe, token_of),
        "outlier": outlier(probe),
        "fp16": fp16,
        "first_non_finite": None if fp16 is None else {k: fp16[k] for k in ("forward", "backward")},
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_bytes": peak_rss(),
    }
    record["verdict"] = [*checkpoint_verdict(record, table), f"Its norms, as found: {record['structure']}."]
    angles = pd.DataFrame(probe.angles.rows(step), columns=ANGLE_COLUMNS)
    return Measured(table, angles, json_number(record))
