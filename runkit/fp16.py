"""Real FP16 on a CPU too.

Accelerate's `mixed_precision="fp16"` does nothing on a CPU: it silently trains in FP32. And the CPU's
own FP16 matrix products run at a hundredth of its FP32 speed. `make_fp16_real` turns on what Accelerate left
off (autocast and the loss scaler), and `half_products` gives matrix products the numerics of a GPU's tensor
cores at about the speed of FP32: FP16 operands, products accumulated in FP32, the result rounded to FP16
(overflow at 65504), in the forward and in the backward pass alike. It has two forms with the same bits:
`HalfMatmul` looks at every operator from Python, `HalfKernels` is called for products alone. Compiled code is
left to `runkit.compiled`, which has the compiler rewrite its products in the same way.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
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
    _ATTENTION_BACKWARD,
}


def is_half(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.float16


def _of_half(product: Any, args: tuple[Any, ...]) -> bool:
    """Whether the operands are FP16: all of them, since PyTorch refuses mixed ones. Attention checks its own."""
    if product in (_ATTENTION, _ATTENTION_BACKWARD):
        return is_half(args[0])
    return all(is_half(x) for x in args if isinstance(x, torch.Tensor))


def _wide(x: Any) -> Any:
    return x.float() if is_half(x) else x


def _in_fp32(call: Callable[..., Any], product: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of `call`, the operator `product`, for the same values in FP32, rounded to FP16."""
    result = call(*map(_wide, args), **{name: _wide(x) for name, x in kwargs.items()})
    if isinstance(result, torch.Tensor):
        return result.half()
    if product is _ATTENTION:
        output, logsumexp = result
        return output.half(), logsumexp
    return tuple(x.half() for x in result)


def _write(out: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """A product in FP32, rounded into the FP16 tensor that `out=` names; an empty one gets its shape.

    Raises:
        RuntimeError: `out` has another dtype or shape.
    """
    if not is_half(out):
        raise RuntimeError(f"out= has dtype {out.dtype}, and a product of FP16 operands needs torch.float16")
    if not out.numel():
        out.resize_(product.shape)
    if out.shape != product.shape:  # it would be broadcast
        raise RuntimeError(f"out= has shape {list(out.shape)}, and the product has {list(product.shape)}")
    return out.copy_(product)


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
        if func not in PRODUCTS or not (args[0].device.type == "cpu" and _of_half(func, args)):
            return func(*args, **kwargs)
        if "out" in kwargs:
            out = kwargs.pop("out")
            return _write(out, func.overloadpacket.default(*map(_wide, args), **kwargs))
        return _in_fp32(func, func, args, kwargs)


class HalfKernels:
    """What `HalfMatmul` does, as the CPU's kernels of the products: no other operator passes through Python.

    The kernels are registered when it is first entered, and stay. Outside the context they hand every call on to
    PyTorch's own, at the cost of a call to Python for each product. A mode belongs to a thread; this is of the
    process: inside the context the FP16 products of all threads are treated so.

    Raises:
        RuntimeError: on entering, where PyTorch is too old to hand out its own kernels (`available` is False).
    """

    available = hasattr(torch.library, "get_kernel")  # torch 2.9
    _library: ClassVar[torch.library.Library | None] = None
    _entered: ClassVar[int] = 0

    def __enter__(self) -> "HalfKernels":
        if HalfKernels._library is None:
            HalfKernels._library = self._register()
        HalfKernels._entered += 1
        return self

    def __exit__(self, *exception: object) -> None:
        HalfKernels._entered -= 1

    @classmethod
    def _register(cls) -> torch.library.Library:
        if not cls.available:
            raise RuntimeError(f"HalfKernels needs torch 2.9 or newer, and this is {torch.__version__}")
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            kernels = {product: cls._kernel(product) for product in sorted(PRODUCTS, key=str)}
            for product, kernel in kernels.items():
                library.impl(product, kernel, "CPU", with_keyset=True)
        return library

    @classmethod
    def _kernel(cls, product: torch._ops.OpOverload) -> Callable[..., Any]:
        own = torch.library.get_kernel(product, "CPU").call_boxed
        # Not called through the dispatcher: in autocast to BF16 that would round the FP32 operands again.
        returned = torch.library.get_kernel(product.overloadpacket.default, "CPU").call_boxed

        def kernel(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
            if not (cls._entered and _of_half(product, args)):
                return own(keys, *args, **kwargs)
            out = kwargs.pop("out", None)
            if out is None:
                return _in_fp32(lambda *a, **k: own(keys, *a, **k), product, args, kwargs)
            return _write(out, returned(keys, *map(_wide, args), **kwargs))

        return kernel


def half_products() -> AbstractContextManager[Any]:
    """The faster of `HalfKernels` and `HalfMatmul` that this PyTorch has."""
    return HalfKernels() if HalfKernels.available else HalfMatmul()


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
    return half_products()
