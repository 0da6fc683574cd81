"""Per-layer statistics of one training step, read by hooks from its own forward and backward pass.

Rows: (step, layer, sublayer, tensor, stat, value). Layer 0 is the embedding, layers are 1 to L. Tensors:

    stream             what the next sublayer reads: after the add and, where there is one, the norm after it
    residual_add       the sum alpha * x + s * branch itself
    branch             a module's output before its output norm
    gradient           the gradient of a sublayer's parameters (unscaled): 2-norm, and variance of its entries
    output_norm_gamma  the learned gain of an output norm

Statistics of activations are over batch, position and channel, in FP32: mean |x|, variance, max |x|.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from torch import nn

from modeling_periln import PeriLlamaForCausalLM
from runkit.folder import write_bytes

from .engine import whole

COLUMNS = ["step", "layer", "sublayer", "tensor", "stat", "value"]


class LayerStats:
    """A context manager around the forward passes of one step; `write` after backward."""

    def __init__(self, model: PeriLlamaForCausalLM, step: int):
        self.model, self.step = model, step
        self._sums: dict[tuple[int, str, str], list[torch.Tensor]] = {}
        self._handles: list = []

    def __enter__(self) -> "LayerStats":
        base = self.model.model
        self._watch(base.embed_norm, 0, "embedding", "stream")
        for l, layer in enumerate(base.layers, start=1):  # noqa: E741
            self._watch(layer.self_attn, l, "attn", "branch")
            self._watch(layer.attn_residual, l, "attn", "residual_add")
            self._watch(layer.attn_residual_norm, l, "attn", "stream")
            self._watch(layer.mlp, l, "mlp", "branch")
            self._watch(layer.mlp_residual, l, "mlp", "residual_add")
            self._watch(layer.mlp_residual_norm, l, "mlp", "stream")
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, module: nn.Module, layer: int, sublayer: str, tensor: str) -> None:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            x = (output[0] if isinstance(output, tuple) else output).detach().float()
            size = torch.tensor(float(x.numel()))
            part = torch.stack([size, x.abs().sum().cpu(), x.sum().cpu(), x.square().sum().cpu(), x.abs().max().cpu()])
            self._sums.setdefault((layer, sublayer, tensor), []).append(part.double())

        self._handles.append(module.register_forward_hook(hook))

    def _activation_rows(self) -> Iterable[tuple]:
        for (layer, sublayer, tensor), parts in self._sums.items():
            parts = torch.stack(parts)
            n, absolute, total, square = parts[:, :4].sum(0).tolist()
            stats = {
                "mean_abs": absolute / n,
                "variance": square / n - (total / n) ** 2,
                "max_abs": parts[:, 4].max().item(),
            }
            for stat, value in stats.items():
                yield self.step, layer, sublayer, tensor, stat, value

    @torch.no_grad()
    def _parameter_rows(self, loss_scale: float) -> Iterable[tuple]:
        base = self.model.model
        groups: list[tuple[int, str, list[nn.Module]]] = [(0, "embedding", [base.embed_tokens, base.embed_norm])]
        for l, layer in enumerate(base.layers, start=1):  # noqa: E741
            attn = [layer.self_attn, layer.attn_input_norm, layer.attn_output_norm, layer.attn_residual_norm]
            mlp = [layer.mlp, layer.mlp_input_norm, layer.mlp_output_norm, layer.mlp_residual_norm]
            groups += [(l, "attn", attn), (l, "mlp", mlp), (l, "layer", [layer])]
            for sublayer, norm in (("attn", layer.attn_output_norm), ("mlp", layer.mlp_output_norm)):
                if hasattr(norm, "weight"):
                    gamma = whole(norm.weight).float()
                    for stat in ("mean", "min", "max"):
                        yield self.step, l, sublayer, "output_norm_gamma", stat, getattr(gamma, stat)().item()
        for layer, sublayer, modules in groups:
            found = [p.grad for m in modules for p in m.parameters() if p.grad is not None]
            gradients = [whole(grad).double().flatten() for grad in found]
            if gradients:
                gradient = torch.cat(gradients) / loss_scale
                yield self.step, layer, sublayer, "gradient", "norm", gradient.norm().item()
                yield self.step, layer, sublayer, "gradient", "variance", gradient.var(correction=0).item()

    def write(self, folder: Path, loss_scale: float, is_main: bool = True) -> None:
        """Write layers/step_*.parquet, on the main rank. Call on all ranks, after backward, before gradients are
        unscaled or cleared.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            ranks: list = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, self._sums)
            self._sums = {key: [part for sums in ranks for part in sums[key]] for key in self._sums}
        rows = [*self._activation_rows(), *self._parameter_rows(loss_scale)]
        if is_main:
            table = pd.DataFrame(rows, columns=COLUMNS).to_parquet(index=False)
            write_bytes(folder / f"step_{self.step:08d}.parquet", table)
