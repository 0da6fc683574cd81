"""The engines: one process, DDP, FSDP2 or DeepSpeed's ZeRO, all through Accelerate, with what it leaves out mended.

Which engine runs is the launcher's to say (`torchrun`, `accelerate launch`; see scripts/launch/), and decides nothing
about the result but rounding. What is mended:

- FP16 on a CPU is real (`runkit/fp16.py`), and under FSDP2, which Accelerate leaves to a policy, it is autocast like
  everywhere else: parameters are gathered and gradients reduced in FP32.
- FSDP2 works on a CPU, where Accelerate ignores its plugin without a word.
- Whether a step is skipped is agreed on by all ranks. Sharded gradients overflow on one rank and not on another.
"""

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from modeling_periln import PeriLlamaForCausalLM
from periln.runkit.errors import UsageError
from periln.runkit.fp16 import HalfMatmul, make_fp16_real
from periln.scripts.recipe import Recipe
from periln.scripts.zero import Zero, zero_stage

LAUNCHED = "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def process_rank() -> int:
    """This process's number, 0 to N - 1, as the launcher has set it; known before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """The number of processes that the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(asked: str) -> str:
    """`cpu` or `cuda` for a recipe's `auto`.

    Raises:
        UsageError: `cuda` where torch sees none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: cuda was asked for, but torch sees no CUDA device")
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU") else "cpu"
    return asked


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in one piece; a collective call for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor on `like`'s device, and cut as `like` is cut."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor


class Engine:
    """Accelerate for one run: `prepare`, then a forward and backward inside `arithmetic()`, then `step`."""

    def __init__(self, recipe: Recipe):
        precision, device = recipe.precision, pick_device(recipe.device)
        scaler = {
            "init_scale": precision.initial_loss_scale,
            "growth_interval": precision.loss_scale_growth_interval,
        }
        fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
        plugin = self._fsdp_plugin() if fsdp else None
        stage = zero_stage()
        self.zero = Zero(stage, recipe) if stage else None
        self.accelerator = Accelerator(
            mixed_precision="no" if self.zero or precision.mode == "fp32" else precision.mode,
            cpu=device == "cpu",
            fsdp_plugin=plugin if device == "cuda" else None,
            deepspeed_plugin=self.zero.plugin if self.zero else None,
            # Gradients are views of DDP's buckets: 4 bytes a parameter less.
            kwargs_handlers=[
                GradScalerKwargs(**scaler),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # the others wait while the main rank writes
            ],
            # Ours to normalize; without a plugin Accelerate reads a divisor from the environment.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        self._half_products = make_fp16_real(self.accelerator, scaler)
        self._zero_scaler = None
        if self.zero:
            self.zero.adopt(self.accelerator)
            if precision.mode == "fp16":
                self._zero_scaler = torch.amp.GradScaler(device, **scaler)
                self._half_products = HalfMatmul() if device == "cpu" else nullcontext()
        if fsdp and device == "cpu" and self.processes > 1:
            self.accelerator.state.fsdp_plugin = plugin
            for state in (PartialState(), self.accelerator.state):  # the one is copied into the other now and then
                state.distributed_type = DistributedType.FSDP
        self._autocast_dtype = DTYPES.get(precision.mode)

    @staticmethod
    def _fsdp_plugin() -> FullyShardedDataParallelPlugin:
        return FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=PeriLlamaForCausalLM._no_split_modules,
            mixed_precision_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
            cpu_ram_efficient_loading=False,
        )

    # --- what is running ---------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        """`single`, `ddp`, `fsdp2`, `zero2` or `zero3`."""
        if self.zero:
            return f"zero{self.zero.stage}"
        if self.accelerator.is_fsdp2:
            return "fsdp2"
        return "single" if self.processes == 1 else "ddp"

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        return self._zero_scaler or self.accelerator.scaler

    @property
    def loss_scale(self) -> float:
        """The scale of this step's loss; 1 without a scaler."""
        return self.scaler.get_scale() if self.scaler else 1.0

    # --- the model ---------------------------------------------------------------------------------------
    def prepare(self, model: PeriLlamaForCausalLM, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        """Wrap model and optimizer. The model's own modules and names stay what they are."""
        if recipe.activation_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.layers = list(model.model.layers)
        if recipe.compile:
            for layer in self.layers:
                layer.compile(dynamic=False)
        self.model = model
        if self.zero:
            self.prepared, self.optimizer = self.zero.prepare(self.accelerator, model, optimizer, self._autocast_dtype)
        else:
            self.prepared, self.optimizer = self.accelerator.prepare(model, optimizer)

    def arithmetic(self) -> AbstractContextManager:
        """The precision of one micro batch's forward and backward: autocast, and on a CPU tensor-core products.

        Of one only: autocast keeps its half-precision copies of the weights until it ends, and under FSDP2 the gradient
        of a copy made in one micro batch is lost in the next.
        """
        stack = ExitStack()
        stack.enter_context(self._half_products)
        if self._autocast_dtype is not None and not self.zero:
            stack.enter_context(torch.autocast(self.device.type, dtype=self._autocast_dtype))
        return stack

    def uncompiled(self) -> AbstractContextManager:
        """Layers as they were before `compile`, so that hooks inside them are called."""
        stack = ExitStack()
        for layer in self.layers:
            compiled, layer._compiled_call_impl = layer._compiled_call_impl, None
            stack.callback(setattr, layer, "_compiled_call_impl", compiled)
        return stack

    def no_sync(self, last: bool) -> AbstractContextManager:
        """Gradients are exchanged after the last micro batch only (under ZeRO after each: that is what it shards)."""
        if self.zero:
            self.zero.before_micro_batch(last, self.loss_scale)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.prepared)

    def backward(self, loss: torch.Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            if self.zero:
                self.prepared.backward(loss)
            else:
                self.accelerator.backward(loss)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) as in the bare model, in its order."""
        return self.model.named_parameters()

    # --- the update --------------------------------------------------------------------------------------
    def gradient_norm(self, clip: float | None) -> float:
        """Unscale the gradients; their 2-norm over the whole model, before they are clipped to `clip`.

        `gradient_norms` has that of every parameter afterwards, on the device.
        """
        if self.zero:
            return self._zero_step()
        if self.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            self._agree_on_overflow()
        parameters = [p for _, p in self.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([p.grad for p in parameters]))
        norm = torch.linalg.vector_norm(norms)
        nn.utils.clip_grads_with_norm_(parameters, math.inf if clip is None else clip, norm)
        self.gradient_norms = whole(norms).detach()
        return whole(norm).item()

    def _zero_step(self) -> float:
        """DeepSpeed clips and updates in one: `step` has nothing left to do."""
        parts, scale = self.zero.gradient_parts(), self.loss_scale
        squares = torch.stack([torch.linalg.vector_norm(part) for _, _, part in parts]).square()
        dist.all_reduce(squares)
        self.gradient_norms = squares.sqrt() / scale
        return self.zero.step(self.scaler)

    def gradient_parts(self) -> tuple[list[tuple[str, int, torch.Tensor]], bool]:
        """(parameter, entries, this rank's part of its gradient) of each, and whether ranks have different parts."""
        if self.zero:
            return self.zero.gradient_parts(), True
        gradients = [(name, p.grad) for name, p in self.parameters() if p.grad is not None]
        sharded = any(isinstance(grad, DTensor) for _, grad in gradients)
        return [(n, g.numel(), g.to_local() if isinstance(g, DTensor) else g) for n, g in gradients], sharded

    def whole(self, parameter: nn.Parameter) -> torch.Tensor:
        """A parameter in one piece; a collective call where it is sharded."""
        return self.zero.whole(parameter) if self.zero else whole(parameter)

    def _agree_on_overflow(self) -> None:
        if self.processes == 1:
            return
        for state in self.scaler._per_optimizer_states.values():
            for found_inf in state["found_inf_per_device"].values():
                local = found_inf.to_local() if isinstance(found_inf, DTensor) else found_inf
                dist.all_reduce(local, dist.ReduceOp.MAX)

    def step(self, finite: bool) -> bool:
        """Update the weights, unless gradients overflowed; returns whether the step was skipped.

        With a scaler it decides, and its own `found_inf` tells: `step_was_skipped` misses fused AdamW, and a scale that
        has come down to 0 falls no more. Without one `finite` does.
        """
        if self.zero:
            return self.zero.skipped
        if self.scaler is not None:
            states = self.scaler._per_optimizer_states.values()
            skipped = any(whole(x).item() > 0 for state in states for x in state["found_inf_per_device"].values())
            self.optimizer.step()
        else:
            skipped = not finite
            if finite:
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return skipped

    # --- between ranks -----------------------------------------------------------------------------------
    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over ranks."""
        return self.accelerator.reduce(value, "mean")

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.processes == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def gather(self, value: Any) -> list[Any]:
        """The small Python value of every rank, by rank."""
        values = [value] * self.processes
        if self.processes > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        self.accelerator.wait_for_everyone()
