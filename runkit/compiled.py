"""torch.compile with the numerics of the eager operators in half precision.

Separate from `fp16`, since the compiler takes two seconds to import and most runs do not need it.
"""

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from periln.runkit.fp16 import PRODUCTS, is_half


class TensorCoreProducts(CustomGraphPass):
    """What `half_products` does, on the graphs of torch.compile: FP16 products become FP32 products of the same values,
    rounded to FP16. Forward and backward graphs pass through it, after autocast and autograd have made them.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in PRODUCTS and _on_cpu_in_half(node.args[0]):
                self._widen(graph, node)

    @staticmethod
    def _widen(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
        values = node.meta["val"]

        def cast(x: torch.fx.Node, value: torch.Tensor, dtype: torch.dtype) -> torch.fx.Node:
            result = graph.call_function(torch.ops.prims.convert_element_type.default, (x, dtype))
            result.meta["val"] = value.to(dtype)
            return result

        def widened(x: Any) -> Any:
            if isinstance(x, torch.fx.Node) and is_half(x.meta.get("val")):
                return cast(x, x.meta["val"], torch.float32)
            return x

        with graph.inserting_before(node):
            node.args = tuple(map(widened, node.args))
            node.kwargs = {name: widened(x) for name, x in node.kwargs.items()}
        if isinstance(values, torch.Tensor):
            parts = [(node, values)]
            node.meta["val"] = values.float()
        else:
            parts = [(user, values[user.args[1]]) for user in node.users]  # operator.getitem
            node.meta["val"] = tuple(x.float() if is_half(x) else x for x in values)
        for part, value in parts:
            if not is_half(value):
                continue  # attention's log-sum-exp is FP32
            readers = list(part.users)
            part.meta["val"] = value.float()
            with graph.inserting_after(part):
                narrow = cast(part, part.meta["val"], torch.float16)
            for reader in readers:
                reader.replace_input_with(part, narrow)

    def uuid(self) -> bytes:
        """A hash of this file, so that cached compiled code belongs to this very pass."""
        return get_hash_for_files((__file__,))


def _on_cpu_in_half(x: Any) -> bool:
    value = x.meta.get("val") if isinstance(x, torch.fx.Node) else None
    return value is not None and is_half(value) and value.device.type == "cpu"


def compile_options(mode: str, device: str) -> dict[str, Any]:
    """Options of torch.compile for a run in `mode` (`fp16`, `bf16`, `fp32`) on `device` (`cpu`, `cuda`).

    In half precision fused operators would pass FP32 values to each other, so that a residual sum of 90,000, stored as
    inf, would reach the next norm and the statistics as 90,000: `emulate_precision_casts` rounds every result as the
    eager operators do.
    """
    if mode == "fp32":
        return {}
    options: dict[str, Any] = {"emulate_precision_casts": True}
    if mode == "fp16" and device == "cpu":
        options["post_grad_custom_post_pass"] = TensorCoreProducts()
    return options
