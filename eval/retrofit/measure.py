"""One model and its source, on the same samples."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn

from periln.eval.formats.emulate import seen_in_a_pass
from periln.eval.formats.locate import locate
from periln.eval.formats.measure import Reference, divergence, measure_recipe, measure_reference
from periln.eval.formats.recipes import Recipe
from periln.eval.formats.summary import row_of
from periln.eval.formats.words import AS_IT_IS
from periln.eval.stability.massive import massive_activations, outlier
from periln.eval.stability.measure import COLUMNS
from periln.eval.stability.probe import Probe
from periln.eval.stability.verdict import depth_profile, place_of, tightest
from periln.eval.structure.anatomy import find_anatomy
from periln.eval.texts.samples import Samples
from periln.runkit.number_format import FP16


@dataclass(frozen=True)
class Source:
    """The source on the samples: FP32 losses and logits, and what its samples' texts weigh in bytes (or tokens)."""

    reference: Reference
    sizes: list[int]


@dataclass
class Measured:
    """One model's numbers: a record for the JSON, and the stream over depth for the figure."""

    record: dict[str, Any]
    depth: list[float] = field(default_factory=list)  # the largest |x| of the stream, embedding first


@contextmanager
def _seen_by(probe: Probe, model: nn.Module) -> Iterator[None]:
    """Every pass of the model is between the probe's `start` and `finish`."""
    first = 0

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        probe.start(first)

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal first
        probe.finish(output.logits, kwargs["input_ids"])
        first += len(kwargs["input_ids"])

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    handles.append(model.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure(
    model: nn.Module, samples: Samples, source: Source | None, sizes: list[int], rows: Sequence[Recipe], batch: int
) -> tuple[Measured, Reference]:
    """Everything that the report has of a model, and its own FP32 reference.

    Args:
        source: what to compare with; None for the source itself.
        rows: formats, each against the model's own FP32 loss.
    """
    probe = Probe(find_anatomy(model))
    with probe, _seen_by(probe, model):
        own = measure_reference(model, samples, batch)
    predicted = samples.ids.shape[0] * (samples.ids.shape[1] - 1)
    table = pd.DataFrame(probe.rows(0), columns=COLUMNS)
    peak = tightest(table)
    massive = massive_activations(probe, lambda sample, token: {"token_id": int(samples.ids[sample, token])})
    record: dict[str, Any] = {
        "loss": own.nats.sum().item() / predicted,
        "nats": own.nats.tolist(),
        "kl": None if source is None else divergence(source.reference, own)[0],
        "top1": None if source is None else divergence(source.reference, own)[1],
        "largest": {"value": peak["value"], "where": place_of(peak), "headroom_bits": FP16.headroom(peak["value"])},
        "massive_activations": massive,
        "outlier": outlier(probe),
        "formats": [],
    }
    located = seen_in_a_pass(locate(model)) if rows else None
    for row in rows:
        assert located is not None
        if missing := [located.missing[target] for target in row.cells if target in located.missing]:
            record["formats"].append({"row": row.key, "missing": missing[0]})
            continue
        found = row_of((AS_IT_IS, row, measure_recipe(located, row, samples, own, batch)), own.nats.tolist(), sizes)
        kept = ("survives", "rise", "rise_share", "kl", "top1")
        record["formats"].append({"row": row.key} | {name: found[name] for name in kept})
    return Measured(record, depth_profile(table, "max_abs").tolist()), own
