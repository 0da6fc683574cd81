"""The numbers of one checkpoint, and of a run's checkpoints, in words."""

import math
from typing import Any

import pandas as pd

from periln.eval.records.words import number
from periln.runkit.number_format import FP16

CLOSE = 3.0  # bits of headroom below which the limit is a few doublings away
POOR = 0.7  # R² below which a fit is not called a description
ONE_SIDED = 0.1  # |scale freedom| from which the loss depends on the scale of the weights


def place_of(row: dict[str, Any]) -> str:
    """`the stream after the mlp of layer 3`, for a row of the records."""
    layer, sublayer, tensor = int(row["layer"]), row["sublayer"], row["tensor"]
    if sublayer == "embedding":
        return "the embedding as layer 1 reads it"
    if sublayer == "final":
        return "the logits" if tensor == "logits" else "the stream after the final norm"
    if ":" in tensor:
        side, name = tensor.split(":")
        return f"the {side} of {name} in layer {layer}"
    said = {
        "stream": "the stream after the",
        "residual_add": "the residual sum after the",
        "branch": "the module output of the",
        "branch_output": "the branch output of the",
        "attention_logits": "the attention logits of the",
    }
    return f"{said.get(tensor, tensor)} {sublayer} of layer {layer}"


def _values(rows: pd.DataFrame, tensor: str, stat: str, sublayers: tuple[str, ...]) -> pd.Series:
    chosen = rows[(rows.tensor == tensor) & (rows.stat == stat) & rows.sublayer.isin(sublayers)]
    return chosen.set_index("layer").value


def depth_profile(rows: pd.DataFrame, stat: str) -> pd.Series:
    """A statistic of the stream after every layer, by layer; 0 is the embedding."""
    return _values(rows, "stream", stat, ("embedding", "mlp")).sort_index()


def tightest(rows: pd.DataFrame) -> dict[str, Any]:
    """The row with the largest `max_abs` of all tensors; what is not finite comes first."""
    peaks = rows[rows.stat == "max_abs"]
    order = peaks.value.fillna(math.inf).sort_values(ascending=False, kind="stable")
    return peaks.loc[order.index[0]].to_dict()


def _growth(record: dict[str, Any], rows: pd.DataFrame) -> str:
    profile, fit = depth_profile(rows, "variance"), record["fits"]["variance"]
    first, last = profile.iloc[0], profile.iloc[-1]
    ends = f"From the embedding to the end of layer {profile.index[-1]}"
    start = f"{ends} the stream's variance goes from {number(first)} to {number(last)}"
    if fit["best"] is None:
        return f"{start}."
    kinds = {"constant": "constant over depth", "linear": "linear in depth", "exponential": "exponential in depth"}
    r2 = {name: fit[name]["r2"] for name in ("linear", "exponential")}
    known = f"R² linear {r2['linear']:.3f}, exponential {r2['exponential']:.3f}"
    poor = fit["best"] in r2 and r2[fit["best"]] < POOR
    called = "neither linear nor exponential in depth describes it well" if poor else ""
    called = called or f"it is best called {kinds[fit['best']]}"
    return f"{start}: {called} ({known}; largest over smallest {number(fit['spread'])})."


def _headroom(rows: pd.DataFrame) -> str:
    row = tightest(rows)
    value = row["value"]
    if not math.isfinite(value):
        return f"Even in the precision of the measurement, {place_of(row)} is not finite."
    bits = FP16.headroom(value)
    said = f"The largest value of all tensors is {number(value)}, in {place_of(row)}"
    if bits < 0:
        return f"{said}: beyond FP16's {FP16.limit} by {-bits:.1f} bits."
    near = ", which is close" if bits < CLOSE else ""
    return f"{said}: {bits:.1f} bits below FP16's {FP16.limit}{near}."


def _fp16(fp16: dict[str, Any] | None) -> list[str]:
    if fp16 is None:
        return []
    said = []
    if fp16["weights"]:
        said.append(f"FP16 cannot hold {len(fp16['weights'])} of the weights, {fp16['weights'][0]} the first.")
    if fp16["forward"] is not None:
        said.append(f"Run in FP16, the forward pass stops being finite at {fp16['forward']['where']}.")
        return said
    scale = fp16["largest_finite_loss_scale"]
    if fp16["backward"] is not None:
        said.append(
            f"Run in FP16, the forward pass is finite; at a loss scale of {fp16['loss_scale']:g} the backward pass "
            f"stops being finite at {fp16['backward']['where']}."
        )
        if scale is not None:
            said.append(f"The largest loss scale at which all gradients are finite is {scale:g}.")
        else:
            said.append("No loss scale down to 2⁻⁸ makes its gradients finite.")
    else:
        said.append(f"Run in FP16, forward and backward pass are finite, up to a loss scale of {scale:g}.")
        if fp16["backward_beyond"] is not None:
            said.append(f"Twice that scale, and what is not finite first is {fp16['backward_beyond']['where']}.")
    return said


def _massive(massive: list[dict[str, Any]], top: dict[str, Any] | None) -> list[str]:
    if not massive:
        said = "There is no massive activation (an entry of the stream 100 times its typical size)"
        if top is None:
            return [f"{said}."]
        after = f"stream after the {top['sublayer']} of layer {top['layer']}"
        place = "embedding" if top["sublayer"] == "embedding" else after
        return [f"{said}: the most any has is {top['ratio']:.0f} times, channel {top['channel']} of the {place}."]
    sentences = []
    for m in massive[:3]:
        after = (
            "in the embedding" if m["sublayer"] == "embedding" else f"after the {m['sublayer']} of layer {m['layer']}"
        )
        token = f" ({m['token']!r})" if m.get("token") is not None else ""
        grows = m["largest"]
        more = (
            f", and reaches {number(grows['value'])} in layer {grows['layer']}" if grows["value"] > m["value"] else ""
        )
        sentences.append(
            f"A massive activation appears {after}: channel {m['channel']}, position {m['position']} of sample "
            f"{m['sample']}{token}, |x| = {number(m['value'])}, {m['ratio']:.0f} times the typical size{more}; it "
            f"lasts to layer {m['last_layer']}."
        )
    return sentences


def _gradients(rows: pd.DataFrame) -> list[str]:
    norms = _values(rows, "gradient", "norm", ("layer",))
    if norms.empty:
        return []
    low, high = norms.idxmin(), norms.idxmax()
    ratio = norms[high] / norms[low] if norms[low] > 0 else math.inf
    said = [
        f"The gradient's norm is largest in layer {high} ({number(norms[high])}) and smallest in layer {low} "
        f"({number(norms[low])}), {number(ratio)} times apart."
    ]
    freedom = _values(rows, "branch_weights", "scale_freedom", ("attn", "mlp")).abs()
    normed = rows[rows.tensor == "output_norm_gamma"]
    if not freedom.empty and not normed.empty and freedom.max() < ONE_SIDED:
        said.append(
            "The loss does not depend on the scale of the branch weights (scale freedom at most "
            f"{number(freedom.max())}): nothing in it keeps a module's output small before its output norm."
        )
    return said


def _redundancy(rows: pd.DataFrame) -> list[str]:
    rise = _values(rows, "stream", "skip_loss", ("layer",)).dropna()
    if rise.empty:
        return []
    low, high = rise.idxmin(), rise.idxmax()
    return [
        f"Skipping one layer costs least in layer {low} (loss {rise[low]:+.3g} nats) and most in layer {high} "
        f"({rise[high]:+.3g})."
    ]


def _attention(rows: pd.DataFrame) -> list[str]:
    top = _values(rows, "attention_logits", "max", ("attn",))
    entropy = _values(rows, "attention_logits", "entropy", ("attn",))
    if top.empty:
        return ["Attention logits could not be seen: the model calls no attention function of Transformers."]
    return [
        f"The largest attention logit is {number(top.max())}, in layer {top.idxmax()}; attention is narrowest in layer "
        f"{entropy.idxmin()} (entropy {entropy.min():.2f} nats)."
    ]


def overall(record: dict[str, Any], rows: pd.DataFrame) -> str:
    """The one sentence that comes first: does it survive FP16?"""
    fp16, value = record.get("fp16"), tightest(rows)["value"]
    bits = FP16.headroom(value)
    if bits < 0 or (fp16 is not None and fp16["forward"] is not None):
        return "This model overflows FP16 in the forward pass."
    if fp16 is not None and fp16["backward"] is not None:
        return "This model runs in FP16, but overflows it in the backward pass."
    if bits < CLOSE:
        return f"This model fits FP16, but only just: {bits:.1f} bits are left."
    return f"This model fits FP16, with {bits:.1f} bits to spare" + (" on these samples." if fp16 else ", as measured.")


def checkpoint_verdict(record: dict[str, Any], rows: pd.DataFrame) -> list[str]:
    """The sentences for one checkpoint."""
    said = [overall(record, rows), _growth(record, rows), _headroom(rows), *_fp16(record.get("fp16"))]
    said += [
        *_massive(record["massive_activations"], record.get("outlier")),
        *_gradients(rows),
        *_redundancy(rows),
        *_attention(rows),
    ]
    return said


def run_verdict(growth: dict[str, Any], steps: list[int]) -> list[str]:
    """The sentences for a run of several checkpoints."""
    said = []
    for stat, word in (("variance", "variance"), ("max_abs", "largest |x|")):
        g = growth[stat]
        first, last = g["values"][0], g["values"][-1]
        factor = last / first if first > 0 else math.nan
        ends = f"From step {steps[0]} to step {steps[-1]} the {word} of the stream after the last layer goes"
        text = f"{ends} from {number(first)} to {number(last)}, times {number(factor)}"
        best = g["fit"]["best"]
        said.append(f"{text}, {best} in steps." if best else f"{text}.")
    return said
