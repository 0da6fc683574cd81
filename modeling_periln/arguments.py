"""What a forward pass is handed, under the names of the installed Transformers, and what it refuses to drop.

Transformers 5.24 renamed the cache from `past_key_values` to `cache`, in forward, layers, masks and outputs. A model
that swallows an argument it does not know in `**kwargs` then decodes every token without its context, silently.
Both names are taken here under every version, and an unknown argument that carries a cache or a mask is refused.
"""

import warnings
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# The cache's name in this version, read off the class that every model of it returns.
CACHE = next(
    (name for name in ("cache", "past_key_values") if name in BaseModelOutputWithPast.__dataclass_fields__), ""
)
if not CACHE:
    raise ImportError(
        f"transformers {transformers.__version__} calls the cache neither `cache` nor `past_key_values`: this version "
        "of PeriLlama does not understand it"
    )
# Continuous batching hands a paged cache over as `cache` in every version; before the renaming it was the attention
# interface that updated it, after it the attention module.
_RENAMED = CACHE == "cache"

# Passed on to the attention interface, the masks, the loss or the capture of outputs, which read them.
PASSED_ON = frozenset(
    {
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "is_causal"),
        *("max_seqlen_q", "max_seqlen_k"),  # the two lengths, as continuous batching called them at first
        *("cache", "block_table", "read_index", "write_index", "logits_indices"),  # continuous batching
        *("attention_instances", "forward_batch"),  # vLLM's and SGLang's attention
        *("num_items_in_batch", "shift_labels", "ignore_index"),
        *("output_hidden_states", "output_attentions", "return_dict"),
    }
)
# Dropped, since the result does not depend on them: the positions say all that `cache_position` did, and the rest is
# what tokenizers and generate() add for models of other kinds.
IGNORED = frozenset({"cache_position", "special_tokens_mask", "token_type_ids", "logits_processor_args"})

# What an argument is called that would change the result: a cache, a mask, positions, other embeddings or states.
_TELLING_NAMES = (
    "cache",
    "past",
    "kv",
    "key_value",
    "mask",
    "position",
    "embeds",
    "hidden_states",
    "seq_len",
    "seqlen",
)


def one_cache(cache: Any, past_key_values: Any, kwargs: dict[str, Any]) -> Any:
    """The cache of a forward pass, under whichever of its two names it came.

    A paged cache of continuous batching is put back into `kwargs` where this version's attention interface reads it.
    Of two caches the filled one counts: PEFT 0.21 replaces the empty cache that generate() made by a prefix, under the
    old name alone.

    Where Transformers has renamed it, the old name alone is warned of (FutureWarning), as by the classes of its tree.

    Raises:
        ValueError: two filled caches that are not the same object.
    """
    if cache is not None and not _RENAMED and not isinstance(cache, Cache):
        kwargs["cache"], cache = cache, None
    if cache is None and past_key_values is not None and _RENAMED and not torch.compiler.is_compiling():
        warnings.warn("`past_key_values` is deprecated. Use `cache` instead.", FutureWarning, stacklevel=2)
    if cache is None or past_key_values is None:
        return past_key_values if cache is None else cache
    if cache is past_key_values or past_key_values.get_seq_length() == 0:
        return cache
    if cache.get_seq_length() == 0:
        return past_key_values
    raise ValueError("`cache` and `past_key_values` are two names of one argument, and two filled caches were given")


def update_cache(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a layer's keys and values (B, K, S, E) and returns all that the cache holds (B, K, S + past, E).

    A paged cache also writes what the attention interface needs into `kwargs`.
    """
    updated: tuple[torch.Tensor, torch.Tensor]
    updated = cache.update(key, value, layer_idx, kwargs=kwargs) if _RENAMED else cache.update(key, value, layer_idx)
    return updated


def refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Refuses an argument that is not known and whose name or type says that dropping it would change the result.

    Others pass: the user's own attention interface may read them.

    Raises:
        TypeError: names the argument and its type.
    """
    for name, value in kwargs.items():
        if value is None or name in PASSED_ON or name in IGNORED:
            continue
        if any(part in name for part in _TELLING_NAMES) or _carries_cache_or_mask(value):
            raise TypeError(
                f"PeriLlama does not know the argument {name!r} (a {type(value).__name__}), and dropping it could "
                "change the result: a cache, a mask or positions must not be lost. Transformers "
                f"{transformers.__version__} may be newer than this model's code"
            )


def _carries_cache_or_mask(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        # A mask of Transformers: boolean (B, S), or additive (B, 1, S, S).
        return (value.dtype == torch.bool and value.ndim >= 2) or (value.is_floating_point() and value.ndim == 4)
    if isinstance(value, (tuple, list)):
        return bool(value) and _carries_cache_or_mask(value[0])
    kind = type(value).__name__.lower()
    return isinstance(value, Cache) or "cache" in kind or "mask" in kind
