"""Massive activations: single entries of the stream that are far above all others (Sun et al., 2024).

One counts as massive when |x| is at least 100 times the typical size of its tensor, the median over channels of their
root mean square; normal entries reach 6 times in a tensor of this size.
"""

from collections.abc import Callable, Iterator
from typing import Any

from periln.eval.stability.moments import Peak
from periln.eval.stability.probe import Probe

RATIO = 100.0


def _peaks(probe: Probe) -> Iterator[tuple[dict[str, Any], Peak]]:
    """Place, value and ratio of every stream's largest entry, from the embedding on."""
    for layer, sublayer, tensor, key in probe.labels:
        moments = probe.moments[key]
        if tensor == "stream" and sublayer != "final" and moments.typical > 0:
            peak = moments.peak
            ratio = peak.value / moments.typical
            yield {"layer": layer, "sublayer": sublayer, "value": peak.value, "ratio": ratio}, peak


def _spot(peak: Peak) -> dict[str, int]:
    return {"channel": peak.channel, "sample": peak.sample, "position": peak.token}


def outlier(probe: Probe) -> dict[str, Any] | None:
    """The entry of a stream that is highest above its typical size, massive or not."""
    found = [place | _spot(peak) for place, peak in _peaks(probe)]
    return max(found, key=lambda place: place["ratio"], default=None)


def massive_activations(probe: Probe, token_of: Callable[[int, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Every channel that holds the massive peak of some stream, where it first appears, and how far it lasts.

    Args:
        token_of: (sample, position) to `{"token_id", "token"}`.
    """
    found: dict[int, dict[str, Any]] = {}
    for place, peak in _peaks(probe):
        layer = place["layer"]
        if not place["ratio"] >= RATIO:
            continue
        if peak.channel not in found:
            found[peak.channel] = place | _spot(peak) | token_of(peak.sample, peak.token) | {"largest": place}
        else:
            known = found[peak.channel]
            if peak.value > known["largest"]["value"]:
                known["largest"] = place
        found[peak.channel]["last_layer"] = layer
    return list(found.values())
