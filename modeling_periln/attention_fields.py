"""What each layer attends to, and how it turns its queries and keys: the fields, in Transformers' own names.

| field | meaning | as in |
|---|---|---|
| `layer_types` | `full_attention` or `sliding_attention`, one a layer | Gemma 3, OLMo 3, EXAONE 4 |
| `sliding_window` | how many tokens a sliding layer sees; without `layer_types` every layer slides | Mistral |
| `rope_parameters` | one rope, or a mapping from layer type to rope | Gemma 3, OLMo 3 |
| `partial_rotary_factor`, in `rope_parameters` | the share of a head, from its start, that is rotated | GLM-4 |
| `no_rope_layers` | one number a layer: 1 with rope, 0 without | SmolLM3, Llama 4 |

Nothing here depends on norms, and no placement depends on these.
"""

from difflib import get_close_matches
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = (FULL, SLIDING)
# Every key that a type of rotary embedding reads.
_ROPE_KEYS = {
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "truncate",
    "type",
}


def layer_types_of(config: Any) -> list[str]:
    """The attention of each layer: `layer_types`, or the same for all layers, by whether there is a window."""
    given = getattr(config, "layer_types", None)
    if given is not None:
        return list(given)
    return [FULL if config.sliding_window is None else SLIDING] * config.num_hidden_layers


def has_rope(config: Any, layer_idx: int) -> bool:
    """Whether layer `layer_idx` (0 to L - 1) rotates its queries and keys."""
    return config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])


def is_rope_by_type(rope_parameters: dict[str, Any] | None) -> bool:
    """Whether `rope_parameters` holds a rope for each layer type."""
    return rope_parameters is not None and any(key in LAYER_TYPES for key in rope_parameters)


def rope_of(config: Any, layer_type: str) -> dict[str, Any]:
    """The rotary parameters of the layers of a type."""
    rope: dict[str, Any] = config.rope_parameters
    return rope[layer_type] if is_rope_by_type(rope) else rope


def rotary_dims(head_dim: int | None, rope: dict[str, Any]) -> int:
    """How many dimensions of a head a rope turns."""
    assert head_dim is not None  # filled in when the configuration is made
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def validate_layers(config: Any) -> None:
    """Layer types, window and layers without rope fit each other and the number of layers.

    Raises:
        ValueError: names the field and the value.
    """
    given, window, layers = getattr(config, "layer_types", None), config.sliding_window, config.num_hidden_layers
    if window is not None and window < 2:
        said = "must be at least 2 (of a window of 1 Transformers' caches keep every token), or None for all tokens"
        raise ValueError(f"sliding_window={window} {said}")
    for kind in given or ():
        if kind not in LAYER_TYPES:
            close = get_close_matches(str(kind), LAYER_TYPES, n=1, cutoff=0.5)
            raise ValueError(f"layer_types has {kind!r}: use one of {close or list(LAYER_TYPES)}")
    if given is not None:
        if len(given) != layers:
            raise ValueError(f"layer_types has {len(given)} entries for num_hidden_layers={layers}")
        if (window is not None) != (SLIDING in given):
            where = "some" if SLIDING in given else "no"
            raise ValueError(f"sliding_window={window}, but layer_types has {SLIDING!r} in {where} layer")
    without = config.no_rope_layers
    if without is not None:
        if len(without) != layers:
            raise ValueError(f"no_rope_layers has {len(without)} entries for num_hidden_layers={layers}")
        if any(flag not in (0, 1) for flag in without):
            raise ValueError(f"no_rope_layers={without!r} must hold 1 for a layer with rope and 0 for one without")
    rope = config.rope_parameters
    if is_rope_by_type(rope):
        if given is None:
            raise ValueError(f"rope_parameters has a rope for {min(rope)!r}, but the model has no layer_types")
        _check_types(rope, given)


def _check_types(rope: dict[str, Any], given: list[str]) -> None:
    """There is exactly one rope for each type of layer that the model has."""
    for kind in sorted(set(given)):
        if kind not in rope:
            raise ValueError(f"rope_parameters has no rope for {kind!r}, which layer_types has")
    for kind, value in rope.items():
        if kind not in given:
            raise ValueError(
                f"rope_parameters has {kind!r} as well as ropes for layer types: layer_types has no such type"
            )
        if not isinstance(value, dict):
            raise ValueError(
                f"rope_parameters[{kind!r}]={value!r} must be a mapping; no_rope_layers says which layers have no rope"
            )


def validate_ropes(config: Any) -> None:
    """The rotary parameters: what Transformers would warn of, or fail at when the model is built, is refused.

    Raises:
        ValueError: names the key and the value.
    """
    rope = config.rope_parameters or {}
    if not is_rope_by_type(rope):
        _validate_rope(rope, "rope_parameters", config.head_dim)
    else:
        for kind, one in rope.items():
            _validate_rope(one, f"rope_parameters[{kind!r}]", config.head_dim)


def _validate_rope(rope: dict[str, Any], field: str, head_dim: int) -> None:
    kinds = {"default", *ROPE_INIT_FUNCTIONS}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in kinds:
        raise ValueError(f"{field}['rope_type']={kind!r} must be one of {sorted(kinds)}")
    unknown = rope.keys() - _ROPE_KEYS
    if unknown:
        name = min(unknown)
        close = get_close_matches(name, _ROPE_KEYS, n=1, cutoff=0.5)
        raise ValueError(f"{field} has an unknown key {name!r}: use one of {close or sorted(_ROPE_KEYS)}")
    for name, least in (("rope_theta", 1), ("factor", 1), ("partial_rotary_factor", 0)):
        value = rope.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
            raise ValueError(f"{field}[{name!r}]={value!r} must be a number of at least {least}")
    dims, share = rotary_dims(head_dim, rope), rope.get("partial_rotary_factor", 1.0)
    if share > 1 or dims < 2 or dims % 2:
        raise ValueError(
            f"{field}['partial_rotary_factor']={share!r} would rotate {dims} of head_dim={head_dim} dimensions: the "
            "number must be even, at least 2 and at most head_dim"
        )
    for name in ("short_factor", "long_factor"):  # a list of one number would be broadcast
        if name in rope and (not isinstance(rope[name], list) or len(rope[name]) != dims // 2):
            pairs = f"{dims // 2} numbers, one for each pair of rotated dimensions"
            raise ValueError(f"{field}[{name!r}]={rope[name]!r} must have {pairs}")
