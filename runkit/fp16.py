"""Real FP16 on a CPU too.

Accelerate's `mixed_precision="fp16"` does nothing on a CPU: it silently trains in FP32. And the CPU's
own FP16 matrix products run at a hundredth of its FP32 speed. `make_fp16_real` turns on what Accelerate left
off (autocast and the loss scaler), and `HalfMatmul` gives matrix products the numerics of a GPU's tensor
cores at about the speed of FP32: FP16 operands, products accumulated in FP32, the result rounded to FP16
(overflow at 65504), in the forward and in the backward pass alike. Compiled code does not pass through
`HalfMatmul`: `runkit.compiled` has the compiler rewrite its products in the same way.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
PRODUCTS = {
    aten.mm.default,
    aten.mm.out,
    aten.bmm.default,
    aten.bmm.out,
    aten.addmm.default,
    aten.addmm.out,
    aten.baddbmm.default,
    aten.baddbmm.out,
    _ATTENTION,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


def is_half(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.float16


class HalfMatmul(TorchDispatchMode):
    """While active, every FP16 matrix product on the CPU is computed as tensor cores do it.

    It works below autograd and autocast, in place of the kernels: a product with FP16 operands is
    computed from the same values in FP32, and its result rounded to FP16, so that the products of the backward
    pass, recomputed activations included, are treated like those of the forward pass. Fused attention is one
    product, as in a flash kernel: FP16 in, FP32 scores and softmax, FP16 out (its log-sum-exp stays FP32).
    Nothing else is touched: no other dtype, no other operator, no other device. Compiled code is left to
    `runkit.compiled`.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: torch.compile works under this mode, and ignores it. (Otherwise it runs everything eagerly.)"""
        return True

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in PRODUCTS or not (is_half(args[0]) and args[0].device.type == "cpu"):
            return func(*args, **kwargs)
        wide = [x.float() if is_half(x) else x for x in args]
        if "out" in kwargs:
            out = kwargs.pop("out")
            return out.copy_(func.overloadpacket.default(*wide, **kwargs))
        result = func(*wide, **{k: x.float() if is_half(x) else x for k, x in kwargs.items()})
        if isinstance(result, torch.Tensor):
            return result.half()
        if func is _ATTENTION:
            output, logsumexp = result
            return output.half(), logsumexp
        return tuple(x.half() for x in result)


def make_fp16_real(accelerator: Any, scaler_options: dict[str, Any] | None = None) -> AbstractContextManager[Any]:
    """Make an `accelerate.Accelerator` with `mixed_precision="fp16"` train in FP16 on a CPU as on a GPU.

    Call it before `prepare`, and do forward and backward inside the context manager that it returns (on a GPU
    an empty one; FP16 and BF16 products are kept from being summed in half precision). `scaler_options` go to
    the CPU's `torch.amp.GradScaler`.
    """
    if accelerator.device.type == "cuda":
        # Accumulate in FP32 there too, in either half precision: otherwise the two could not be compared.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if accelerator.mixed_precision != "fp16" or accelerator.device.type != "cpu":
        return nullcontext()
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", **(scaler_options or {}))
    return HalfMatmul()
