"""Models with one fault, planted by hand in their weights."""

import torch
from stability_families import WIDTH, build

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM


@torch.no_grad()
def with_massive_activation(token: int, channel: int, layer: int = 2, family: str = "llama"):
    """The MLP of `layer` (from 1) writes one huge entry into `channel`, for one token of the vocabulary alone."""
    model = build(family, moved=False)
    base = model.base_model
    flag, neuron, mlp = 7, 3, base.layers[layer - 1].mlp
    base.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(1))
    base.embed_tokens.weight[:, flag] = 0.0
    base.embed_tokens.weight[token, flag] = 4.0
    for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
        matrix[neuron] = 0.0
        matrix[neuron, flag] = 4.0
    mlp.down_proj.weight[:, neuron] = 0.0
    mlp.down_proj.weight[channel, neuron] = 5.0
    return model


@torch.no_grad()
def with_large_stream(family: str, layer: int = 2):
    """Branches stay below 65504, the sum after the MLP of `layer` does not: the embedding holds 45000 in a channel."""
    model = build(family, moved=False)
    base = model.base_model
    scale = getattr(base.embed_tokens, "embed_scale", torch.tensor(1.0))
    scale = float(scale) if family != "gemma2" else WIDTH**0.5
    base.embed_tokens.weight[:, 0] = 45000.0 / scale
    mlp = base.layers[layer - 1].mlp
    # The norm before the MLP leaves little but channel 0: a matrix that reads it gives the same for every token.
    for name in ("gate_proj", "up_proj"):
        getattr(mlp, name).weight.zero_()
        getattr(mlp, name).weight[:, 0] = 1.0
    mlp.down_proj.weight.zero_()
    norm = {"llama": None, "gemma2": "post_feedforward_layernorm", "gemma3": "post_feedforward_layernorm"}[family]
    if norm is None:
        mlp.down_proj.weight[0] = 30000.0 / 30 / mlp.down_proj.in_features
    else:
        mlp.down_proj.weight[0] = 0.1
        getattr(base.layers[layer - 1], norm).weight[0] = 30000.0 / WIDTH**0.5 - 1
    return model


@torch.no_grad()
def with_large_branch(family: str, layer: int = 2, kind: str = "mlp"):
    """A module's output is beyond 65504 before its output norm, which brings it back."""
    model = build(family)
    block = model.base_model.layers[layer - 1]
    projection = block.mlp.down_proj if kind == "mlp" else block.self_attn.o_proj
    projection.weight.mul_(5e4)
    block_input = block.mlp.gate_up_proj if hasattr(block.mlp, "gate_up_proj") else None
    if kind == "mlp":
        for matrix in [block_input] if block_input is not None else [block.mlp.gate_proj, block.mlp.up_proj]:
            matrix.weight.mul_(20)
    else:
        block.self_attn.v_proj.weight.mul_(100)
    return model.eval()


@torch.no_grad()
def with_large_gradient(layer: int = 2):
    """A Peri-LN model whose forward pass is small everywhere; one tiny branch before an output norm with a tiny epsilon
    makes that norm's gradient overflow."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = PeriLlamaConfig(**sizes, **heads, norm_placement="peri", norm_eps={"mlp_output_norm": 1e-20})
    model = PeriLlamaForCausalLM(config).eval()
    block = model.model.layers[layer - 1]
    block.mlp.down_proj.weight.mul_(2e-3)
    block.mlp.up_proj.weight.mul_(0.1)
    model.lm_head.weight.mul_(300)
    return model
