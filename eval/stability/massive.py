"""Massive activations: single entries of the stream that stand far above all others (Sun et al., 2024).

One counts as massive when |x| is at least 100 times the typical size of its tensor, the median over channels of their
root mean square; normal entries reach 6 times in a tensor of this size.
"""

from collections.abc import Callable
from typing import Any

from .probe import Probe

RATIO = 100.0


def massive_activations(probe: Probe, token_of: Callable[[int, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Every channel that holds the massive peak of some stream, where it first appears, and how far it lasts.

    Args:
        token_of: (sample, position) to `{"token_id", "token"}`.
    """
    found: dict[int, dict[str, Any]] = {}
    for layer, sublayer, tensor, key in probe.labels:
        if tensor != "stream" or sublayer == "final":
            continue
        moments = probe.moments[key]
        peak, typical = moments.peak, moments.typical
        if not typical > 0 or not peak.value >= RATIO * typical:
            continue
        place = {"layer": layer, "sublayer": sublayer, "value": peak.value, "ratio": peak.value / typical}
        if peak.channel not in found:
            spot = {"channel": peak.channel, "sample": peak.sample, "position": peak.token}
            found[peak.channel] = place | spot | token_of(peak.sample, peak.token) | {"largest": place}
        else:
            known = found[peak.channel]
            if peak.value > known["largest"]["value"]:
                known["largest"] = place
        found[peak.channel]["last_layer"] = layer
    return list(found.values())
