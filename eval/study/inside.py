"""What is measured inside a trained cell: angles between layers, what a layer is worth, and the bounds."""

from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from periln.eval.bounds.certificate import certify
from periln.eval.bounds.residual_step import steps_of, token_steps
from periln.eval.bounds.residual_step import summary as step_summary
from periln.eval.bounds.token_bounds import summary, token_bounds
from periln.eval.stability.probe import Probe
from periln.eval.stability.redundancy import skip_losses
from periln.eval.structure.anatomy import find_anatomy
from periln.eval.targets import find_measured
from periln.eval.texts.samples import find_samples
from periln.eval.texts.windows import token_loss

SAMPLES, TOKENS, BATCH, SEED = 16, 128, 4, 0


def look_inside(run: Path, texts: Path) -> dict[str, Any]:
    """Of the newest checkpoint of a run, on samples of held-out text, in FP32:

    angular: angular distance of the streams after layers l and l + 1, by l from 0, in units of pi.
    skip_loss: by how many nats a token the loss rises without each layer.
    proposition: Proposition 3.1's bound: share of tokens at which it held, median of measured / bound.
    steps: bounds on the stream's growth: share of tokens at which they held, largest length / its bound.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = find_measured(str(run))
    network = model.chosen.load(torch.float32, "cpu", False)
    config: Any = network.config
    length = min(TOKENS, config.max_position_embeddings)
    samples = find_samples(config, model.tokenizer(None, False), str(texts), SAMPLES, length, SEED)
    anatomy = find_anatomy(network)
    steps = steps_of(anatomy, certify(network, anatomy=anatomy))
    taken = step_summary(token_steps(anatomy, steps, samples.batches(BATCH)), steps)
    bounds = summary(token_bounds(anatomy, samples.batches(BATCH)))
    with torch.no_grad():
        probe = Probe(anatomy, 1)
        with probe:
            for number, ids in enumerate(samples.batches(BATCH)):
                probe.start(number * BATCH)
                probe.finish(network(input_ids=ids, use_cache=False).logits, ids)

        def loss() -> float:
            total = sum(
                token_loss(network(input_ids=ids, use_cache=False).logits, ids).item() for ids in samples.batches(BATCH)
            )
            return total / samples.ids[:, 1:].numel()

        skipped = skip_losses(anatomy, loss, 0)
    angles = [value for _, _, _, value in probe.angles.rows(0)]
    held, tight = bounds.held.dropna(), bounds.tightness.dropna()
    used = (taken.largest_length / taken.length_bound)[taken.length_bound < float("inf")]
    return {
        "angular": [round(value, 5) for value in angles],
        "skip_loss": [round(row[-1], 5) for row in skipped],
        "proposition": {
            "held": float(held.mean()) if len(held) else None,
            "tightness": round(float(tight.median()), 5) if len(tight) else None,
        },
        "steps": {"held": float(taken.held.mean()), "used": round(float(used.max()), 5) if len(used) else None},
    }
