"""The figures, as data: the paper's by its numbers, and five that the paper does not have."""

from collections.abc import Callable
from dataclasses import dataclass

from periln.eval.figures import depth, headroom, overview, redundancy, sweeps, training
from periln.eval.figures.pieces import Chart
from periln.eval.figures.selection import View
from periln.runkit.number_format import FP16

_PRETRAIN = training.PRETRAIN


@dataclass(frozen=True)
class Entry:
    """A figure: what the paper's shows, and how it is drawn; its title is in `TITLES`.

    `sizes` are the paper's, drawn where the runs have them; `like` names a figure that shows the same for other sizes,
    so that `all` draws this one only for runs of its sizes. `plain`: runs that change something about their
    placement (gamma frozen, ...) are left out if there are others, as in the paper.
    """

    paper: str
    alt: str
    draw: Callable[[View], Chart]
    sizes: tuple[str, ...] = ()
    like: str = ""
    plain: bool = False


_COMPARED = "Line plots of training loss, and of gradient norm on a log axis, against the step"
_RATES = "Final training loss against the learning rate on a log axis, a line a placement, crosses for diverged runs"
_DISTANCES = "Line plot of the angular distance over each layer, and heat maps of the distance between any two layers"
_NORM_ON = (
    "Needs two runs that differ in model.embedding_norm: "
    f"{_PRETRAIN} scripts/recipes/{{0}}-peri.yaml and {{0}}-peri-no-embedding-norm.yaml."
)


def _embedding_norm(number: str, size: str) -> Entry:
    sentence = _NORM_ON.format(size.lower())
    return Entry(
        f"The paper's Figure {number} compares Peri-LN with and without a norm on the embedding, {size}.",
        f"{_COMPARED}, with and without a norm on the embedding.",
        training.switched("embedding_norm", (True, False), sentence),
        (size,),
        "" if number == "16" else "16",
    )


def _olmo2(number: str, size: str) -> Entry:
    return Entry(
        f"The paper's Figure {number} compares Peri-LN with output norms and QK-norm (OLMo 2), {size}; the last 5B of "
        "30B tokens.",
        f"{_COMPARED}, of Peri-LN and of output norms with QK-norm.",
        training.olmo2,
        (size,),
        "" if number == "20" else "20",
    )


def _hidden(number: str, size: str) -> Entry:
    return Entry(
        f"The paper's Figure {number} shows mean absolute value and variance of the hidden state by layer, {size}, on "
        "1,000 WikiText samples.",
        "Line plots of mean absolute value and variance of the residual stream against depth, log axes, at "
        "initialization and at the end.",
        depth.hidden_state,
        (size,),
        "" if number == "5" else "5",
        plain=True,
    )


CATALOGUE: dict[str, Entry] = {
    "overview": Entry(
        "The paper has no such figure: it is what the report's first sentences are about.",
        "Three panels with a row a placement: dots of the loss, dots of the least headroom in bits, and a table of how "
        "many runs finished at each learning rate.",
        overview.overview,
    ),
    "1": Entry(
        "The paper's Figure 1 shows the variance by layer from initialization to 6.3B tokens, 1.5B.",
        "A panel a placement: variance of the residual stream against depth on a log axis, a line a recorded step.",
        depth.growth,
        ("1.5B",),
        plain=True,
    ),
    "3a": Entry(
        "The paper's Figure 3(a) shows the pretraining loss across learning rates, 400M to 3.2B; Post-LN is shown "
        "there, in Figure 8.",
        f"{_RATES}; a panel a model size.",
        sweeps.by_size,
        plain=True,
    ),
    "3b": Entry(
        "The paper's Figure 3(b) shows the pretraining loss of its best 400M models.",
        "Line plot of training loss against the step, a line a placement.",
        training.best(("loss",)),
        ("400M",),
        plain=True,
    ),
    "3c": Entry(
        "The paper's Figure 3(c) shows the gradient norm of its best 400M models.",
        "Line plot of the gradient norm on a log axis against the step, a line a placement.",
        training.best(("grad_norm",)),
        ("400M",),
        plain=True,
    ),
    "4": Entry(
        "The paper's Figure 4 compares Pre-LN with Peri-LN, gamma learned and frozen at 1, without embedding norm.",
        f"{_COMPARED}, with gamma learned and with gamma frozen.",
        training.frozen_gamma,
    ),
    "5": _hidden("5", "1.5B"),
    "6": Entry(
        "The paper's Figure 6 shows gradient norm and variance by layer at initialization and at the end, 1.5B.",
        "Line plots of norm and variance of each layer's gradient on log axes, at initialization and at the end.",
        depth.gradient_by_layer,
        ("1.5B",),
        plain=True,
    ),
    "7a": Entry(
        "The paper's Figure 7(a) shows the angular distance of hidden states at initialization, 400M.",
        f"{_DISTANCES}, at initialization.",
        redundancy.distances(last=False),
        ("400M",),
        plain=True,
    ),
    "7b": Entry(
        "The paper's Figure 7(b) shows the gamma of every output norm of a 400M Peri-LN model during training.",
        "Line plots of the mean gamma of the attention and MLP output norms against the step, a line a layer.",
        depth.output_gamma,
        ("400M",),
    ),
    "7c": Entry(
        "The paper's Figure 7(c) shows the angular distance of hidden states after training, 400M.",
        f"{_DISTANCES}, at the end of training.",
        redundancy.distances(last=True),
        ("400M",),
        plain=True,
    ),
    "7d": Entry(
        "The paper's Figure 7(d) shows the angular distance with the output norms' gamma fixed at 1, 400M.",
        f"{_DISTANCES}, with gamma learned and with gamma frozen.",
        redundancy.frozen,
        ("400M",),
    ),
    "8": Entry(
        "The paper's Figure 8 shows the learning rates explored for Post-LN.",
        f"{_RATES}: Post-LN alone.",
        sweeps.post_by_size,
    ),
    "9": Entry(
        "The paper's Figure 9 shows what 3(b) and 3(c) show, for 3.2B and 1.5B.",
        f"{_COMPARED}, a row a size.",
        training.best(("loss", "grad_norm")),
        ("3.2B", "1.5B"),
        "3b",
        plain=True,
    ),
    "10": _hidden("10", "3.2B"),
    "11": _hidden("11", "400M"),
    "12": Entry(
        "The paper's Figure 12 shows the exploration of learning rates at 8B, 16B and 30B tokens (its caption there is "
        "that of Figure 13).",
        f"{_RATES}; a panel a token budget.",
        sweeps.tokens,
    ),
    "13": Entry(
        "The paper's Figure 13 shows the exploration of learning rates at sequence length 2,048 instead of 8,192.",
        f"{_RATES}; a panel a sequence length.",
        sweeps.sequence_length,
    ),
    "14": Entry(
        "The paper's Figure 14 shows the exploration of learning rates with 30 % warm-up instead of 10 %.",
        f"{_RATES}; a panel a warm-up.",
        sweeps.warmup,
    ),
    "15": Entry(
        "The paper's Figure 15 compares the two norms in a 400M Peri-LN model.",
        f"{_COMPARED}, with LayerNorm and with RMSNorm.",
        training.switched(
            "norm_type",
            ("rmsnorm", "layernorm"),
            f"Needs two runs that differ in model.norm_type: {_PRETRAIN} scripts/recipes/400m-peri.yaml and "
            "400m-peri-layernorm.yaml.",
        ),
    ),
    "16": _embedding_norm("16", "400M"),
    "17": _embedding_norm("17", "1.5B"),
    "18": _embedding_norm("18", "3.2B"),
    "20": _olmo2("20", "400M"),
    "21": _olmo2("21", "1.5B"),
    "22": _olmo2("22", "3.2B"),
    "rates": Entry(
        "The paper shows each placement at its best rate only (Figures 3b, 3c).",
        f"{_COMPARED}; a row a learning rate.",
        training.every_rate,
    ),
    "headroom": Entry(
        "The paper has no such figure; it names numeric overflow as a risk of growing hidden states.",
        f"Heat maps, a panel a placement and learning rate: bits left below {FP16.limit} by layer and step, overflow "
        "marked.",
        headroom.headroom_map,
    ),
    "peaks": Entry(
        "The paper has no such figure.",
        "Line plots of the largest absolute value by layer in stream, residual sum and module output, on a log axis, "
        f"with a dashed line at {FP16.limit}.",
        headroom.peaks_by_layer,
    ),
    "events": Entry(
        "The paper speaks of gradient spikes and of diverged runs; it has no such figure.",
        "A row a run with marks at gradient spikes, skipped steps and divergence; below, the loss scale.",
        training.spikes_and_loss_scale,
    ),
}
