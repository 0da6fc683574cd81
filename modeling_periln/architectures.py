"""The architectures of Transformers that are rows of the table of placements: where each is, and what it calls things.

| architecture | row | other than norms |
|---|---|---|
| Llama | `pre` | |
| Mistral | `pre` | one sliding window for all layers |
| Qwen 3 | `pre`, QK-norm by head | sliding layers |
| OLMo 2 | `output`, QK-norm over all heads | |
| OLMo 3 | `output`, QK-norm over all heads | sliding layers, a rope for each type |
| EXAONE 4 | `output`, QK-norm by head | sliding layers; full layers next to them have no rope |
| HyperCLOVA X | `peri`, or `pre` | |
| GLM-4 | `peri` | a rope for a share of the head, in pairs (0, 1), (2, 3), ...; gate and up in one matrix |
| Gemma 3 (text) | `sandwich`, centered gains, QK-norm by head | sliding layers, two ropes, scores and table scaled |
| BitNet, with plain weights | `sub_ln` | |

The embedding norm of `peri` is folded into the table, or off.
"""

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import transformers

from .placements import PLACEMENTS, Placement


class ConversionRefused(ValueError):
    """What was asked for cannot be done without changing the function; the message names the field and says why."""


@dataclass(frozen=True)
class Architecture:
    """One of Transformers' own architectures.

    name: of the classes, `<name>ForCausalLM` and `<name>Config` (or `config_name`).
    row: in `placements.PLACEMENTS`.
    names: what it calls our norms.
    output_switch: whether its configuration has `use_post_norm`.
    attention_bias: whether q, k, v and o may have biases, or q, k and v alone.
    full_heads: head_dim times heads is the hidden size.
    windows: no layer slides, all do, or each by `layer_types`.
    head_dim_field: whether its configuration declares head_dim; else engines other than Transformers may not read it.
    """

    name: str
    row: str
    names: dict[str, str]
    config_name: str = ""
    output_switch: bool = False
    qk_norm: str | None = None
    centered: bool = False
    attention_bias: Literal["qkvo", "qkv", ""] = "qkvo"
    mlp_bias: bool = False
    heads_divide_hidden: bool = False
    full_heads: bool = False
    fused_and_interleaved: bool = False
    partial_rotary: bool = False
    windows: Literal["none", "all", "by type"] = "none"
    ropes_by_type: bool = False
    no_rope_beside_windows: bool = False
    scaled_scores: bool = False  # query_pre_attn_scalar
    table_scale: Literal["none", "embedding_multiplier", "sqrt(hidden_size)"] = "none"
    act_field: str = "hidden_act"
    head_dim_field: bool = True

    @property
    def placement(self) -> Placement:
        return PLACEMENTS[self.row]

    @property
    def model_class(self) -> type:
        return _stock_class(f"{self.name}ForCausalLM")

    @property
    def config_class(self) -> type:
        return _stock_class(self.config_name or f"{self.name}Config")

    def table_factor(self, hidden_size: int, ours: float) -> float:
        """What the architecture multiplies embeddings by, for a model of ours that multiplies them by `ours`."""
        return {"none": 1.0, "embedding_multiplier": ours, "sqrt(hidden_size)": math.sqrt(hidden_size)}[
            self.table_scale
        ]


def _stock_class(name: str) -> type:
    found: type | None = getattr(transformers, name, None)
    if found is None:
        raise ConversionRefused(f"transformers {transformers.__version__} has no {name}: a newer version is needed")
    return found


_PRE = {
    "final_norm": "norm",
    "attn_input_norm": "input_layernorm",
    "mlp_input_norm": "post_attention_layernorm",
}
_OUTPUT = {
    "final_norm": "norm",
    "attn_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_GEMMA = _OUTPUT | {"attn_input_norm": "input_layernorm", "mlp_input_norm": "pre_feedforward_layernorm"}
_BITNET = _PRE | {"self_attn.inner_norm": "attn_sub_norm", "mlp.inner_norm": "ffn_sub_norm"}
_HYPERCLOVAX = _PRE | {"attn_output_norm": "post_norm1", "mlp_output_norm": "post_norm2"}
_GLM4 = _PRE | {"attn_output_norm": "post_self_attn_layernorm", "mlp_output_norm": "post_mlp_layernorm"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("Llama", "pre", _PRE, mlp_bias=True, heads_divide_hidden=True),
    "olmo2": Architecture("Olmo2", "output", _OUTPUT, qk_norm="full", head_dim_field=False),
    "hyperclovax": Architecture(
        "HyperCLOVAX",
        "peri",
        _HYPERCLOVAX,
        output_switch=True,
        mlp_bias=True,
        heads_divide_hidden=True,
        table_scale="embedding_multiplier",
    ),
    "glm4": Architecture("Glm4", "peri", _GLM4, attention_bias="qkv", fused_and_interleaved=True, partial_rotary=True),
    "mistral": Architecture("Mistral", "pre", _PRE, attention_bias="", windows="all"),
    "qwen3": Architecture("Qwen3", "pre", _PRE, qk_norm="head", windows="by type"),
    "olmo3": Architecture(
        "Olmo3", "output", _OUTPUT, qk_norm="full", windows="by type", ropes_by_type=True, head_dim_field=False
    ),
    "exaone4": Architecture(
        "Exaone4",
        "output",
        _OUTPUT,
        qk_norm="head",
        attention_bias="",
        windows="by type",
        no_rope_beside_windows=True,
        head_dim_field=False,
    ),
    "gemma3_text": Architecture(
        "Gemma3",
        "sandwich",
        _GEMMA,
        config_name="Gemma3TextConfig",
        qk_norm="head",
        centered=True,
        heads_divide_hidden=True,
        windows="by type",
        ropes_by_type=True,
        scaled_scores=True,
        table_scale="sqrt(hidden_size)",
        act_field="hidden_activation",
    ),
    "bitnet": Architecture("BitNet", "sub_ln", _BITNET, full_heads=True, head_dim_field=False),
}


def architecture(target: str) -> Architecture:
    """The row of `ARCHITECTURES` called `target`, or a ConversionRefused that names the nearest."""
    if target not in ARCHITECTURES:
        close = get_close_matches(str(target), ARCHITECTURES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConversionRefused(f"{target!r} is not a known architecture: {hint}use one of {list(ARCHITECTURES)}")
    return ARCHITECTURES[target]
