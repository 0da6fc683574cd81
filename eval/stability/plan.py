"""How long a measurement takes and how much memory, announced before it starts; and how much of it is done.

The unit is a plain forward pass of one sample, timed on the first one. The cost of each part was measured on
SmolLM2-135M and Gemma 3 270M; memory is counted from the sizes of the model.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from periln.eval.stability.layer_gradients import ends_in_place, kept_streams
from periln.eval.structure.anatomy import Anatomy
from periln.eval.texts.samples import Samples
from periln.eval.texts.windows import PIECE

GIB = 2.0**30
PROCESS = 3 * 2**28  # bytes of Python, its libraries and a large tokenizer: 0.6 to 0.8 GiB were seen
LOGITS = 2**26  # numbers of a batch's logits at most: 256 MiB
# The plain passes of a sample that a part takes for each of its samples.
PROBED = 1.55
BACKWARD = 3.7  # streams, a layer at a time forward and backward, sums in FP64
FP16_FORWARD, FP16_BACKWARD = 1.5, 9.0  # of one sample; of several, each runs its forward pass three times
CERTIFICATE = 6.0
STEPS = 1000  # in which the bar moves


@dataclass(frozen=True)
class Options:
    """How much is measured; a number of samples of 0 leaves that part out."""

    batch_size: int = 4
    angles: int | None = None
    backward_samples: int = 32
    skip_samples: int = 16
    fp16_samples: int = 4
    loss_scale: float = 1.0
    skip_tokens: int | None = None
    certificate: bool = False

    def asked(self) -> dict[str, Any]:
        """What decides the result (the batch size does not)."""
        without = {"batch_size"} | ({"skip_tokens"} if self.skip_tokens is None else set())
        return {k: v for k, v in asdict(self).items() if k not in without}


@dataclass
class Part:
    """A part of a measurement: its name, the method that does it, and what it takes in plain passes."""

    name: str
    does: str
    passes: float
    tell: Callable[[], None]
    share: float = 0.0

    def done(self, share: float) -> None:
        """Report a further share of it, from 0 to 1."""
        self.share = min(1.0, self.share + share)
        self.tell()

    def finish(self) -> None:
        self.share = 1.0
        self.tell()


@dataclass
class Plan:
    """The parts in their order; `seconds` a plain pass of a sample takes, `memory` the largest part of it needs."""

    parts: list[Part] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0

    @classmethod
    def of(cls, options: Options, samples: Samples, tell: Callable[["Plan"], None]) -> "Plan":
        """The parts that the options ask for; `tell` is called each time that more is done."""
        plan = cls()

        def add(wanted: int, name: str, does: str, passes: float) -> None:
            if wanted:
                plan.parts.append(Part(name, does, passes, lambda: tell(plan)))

        o = options
        add(1, "forward", "forward", PROBED * len(samples.ids))
        add(o.certificate, "certificate", "certify", CERTIFICATE)
        add(o.backward_samples, "backward", "backward", BACKWARD * o.backward_samples)
        tokens = samples.ids.shape[1]
        add(o.skip_samples, "skipped layers", "skips", o.skip_samples * min(1.0, (o.skip_tokens or tokens) / tokens))
        forwards = 3 if o.fp16_samples > 1 else 1
        add(o.fp16_samples, "FP16", "in_fp16", (forwards * FP16_FORWARD + FP16_BACKWARD) * o.fp16_samples)
        return plan

    @torch.no_grad()
    def measure(
        self, anatomy: Anatomy, samples: Samples, staged: bool, by_layer: bool, in_place: bool, options: Options
    ) -> None:
        """Time a plain pass, and compute from the model's sizes what depends on them.

        Args:
            staged: the model runs in pieces.
            by_layer: its gradients are taken a layer at a time.
            in_place: the model itself becomes FP16.
        """
        self.time(anatomy, samples.ids[:1])
        head = anatomy.lm_head.weight.numel() / sum(p.numel() for p in _matrices(anatomy))
        for part in self.parts:
            if part.does == "skips":
                each = head + (1 - head) / 2 if staged else 1.0
                part.passes *= anatomy.num_layers * each + 1
            if part.does == "backward" and by_layer:
                stream = samples.ids.shape[1] * anatomy.hidden_size * anatomy.embedding.weight.element_size()
                every, _ = kept_streams(anatomy.num_layers, options.backward_samples, stream)
                part.passes += options.backward_samples * (1 - 1 / every)
        ends = ends_in_place(anatomy, samples.ids[:1, :16].to(anatomy.lm_head.weight.device))
        self.memory = memory(anatomy, samples.ids.shape[1], self.parts, by_layer, in_place, options, ends)
        self.parts[0].tell()

    @torch.no_grad()
    def time(self, anatomy: Anatomy, ids: torch.Tensor) -> None:
        """Time a plain pass of a sample (1, S)."""
        ids = ids.to(next(anatomy.model.parameters()).device)
        anatomy.model(input_ids=ids[:, :16], use_cache=False)  # the first pass reads the weights from disk
        started = time.perf_counter()
        anatomy.model(input_ids=ids, use_cache=False)
        self.seconds = time.perf_counter() - started

    @property
    def passes(self) -> float:
        return sum(part.passes for part in self.parts)

    @property
    def share(self) -> float:
        """How much is done, from 0 to 1."""
        return sum(part.passes * part.share for part in self.parts) / self.passes

    @property
    def part(self) -> str:
        """The part that is running."""
        return next((part.name for part in self.parts if part.share < 1), "")

    def said(self) -> str:
        """What to expect, in a sentence."""
        return (
            f"about {duration(self.passes * self.seconds)} ({self.passes:.0f} forward passes of a sample, "
            f"{self.seconds:.2g} s each) and {self.memory / GIB:.1f} GiB of memory"
        )


def _matrices(anatomy: Anatomy) -> list[torch.nn.Parameter]:
    """What a forward pass multiplies with: the embedding's rows are only looked up."""
    inside = {id(p): p for _, layer in anatomy.layers for p in layer.parameters()}
    return [*inside.values(), anatomy.lm_head.weight]


def memory(
    anatomy: Anatomy,
    tokens: int,
    parts: list[Part],
    by_layer: bool,
    in_place: bool,
    options: Options,
    ends: tuple[bool, bool] = (True, True),
) -> int:
    """Bytes at the peak, about: the weights, and the most that any part holds in addition.

    `ends`: whether the gradient of the logits takes their place, and whether the head's weight has one gradient only.
    """
    parameters = list(anatomy.model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    largest = max(p.numel() for p in parameters)
    vocabulary = anatomy.lm_head.weight.shape[0]
    logits = 4 * tokens * vocabulary
    layer = max(sum(p.numel() for p in layer.parameters()) for _, layer in anatomy.layers)
    of_layer = anatomy.embedding.weight.element_size() * tokens * anatomy.hidden_size
    stream = of_layer * (anatomy.num_layers + 1)
    half = sum(p.numel() * 2 for p in parameters)
    batch = min(options.batch_size, samples_at_once(anatomy, tokens))
    backward = samples_backward(options, anatomy, tokens)
    # In FP16 the head's product is taken in FP32, its gradient as well; all gradients are there at the end.
    in_fp16 = max(half + 8 * largest + 3 * logits, 2 * half) + 16 * stream
    if by_layer:
        kept = kept_streams(anatomy.num_layers, options.backward_samples, of_layer)[1]
        in_layers = 4 * layer + 32 * backward * of_layer
        at_logits = backward * (1 if ends[0] else 5) * logits + 16 * PIECE * vocabulary
        twice = 0 if ends[1] or options.backward_samples <= backward else 4 * anatomy.lm_head.weight.numel()
        gradients = 4 * largest + kept * of_layer + max(at_logits + twice, in_layers)
    else:
        gradients = 4 * sum(p.numel() for p in parameters) + backward * (4 * logits + 16 * stream)
    beside = {
        "forward": batch * (2 * logits + 8 * stream),
        "certify": max(2 * 8 * layer, 2**28),  # a layer in FP64, or a piece of the head
        "backward": gradients,
        "skips": batch * (3 * logits + stream),
        "in_fp16": in_fp16 - (weights if in_place else 0),
    }
    return PROCESS + weights + max(beside[part.does] for part in parts)


def samples_backward(options: Options, anatomy: Anatomy, tokens: int) -> int:
    """The samples of a batch whose gradients are taken: half as many as without."""
    return max(1, min(options.batch_size, samples_at_once(anatomy, tokens)) // 2)


def samples_at_once(anatomy: Anatomy, tokens: int) -> int:
    """How many samples of `tokens` tokens have logits of at most `LOGITS` numbers."""
    return max(1, LOGITS // (tokens * anatomy.lm_head.weight.shape[0]))


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
