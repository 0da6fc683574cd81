"""The engines: one process, DDP, FSDP2 or DeepSpeed's ZeRO, all through Accelerate, with what it leaves out mended.

Which engine runs is the launcher's to say (`torchrun`, `accelerate launch`; see scripts/launch/), and decides nothing
about the result but rounding. What is mended:

- FP16 on a CPU is real (`runkit/fp16.py`), and under FSDP2, which Accelerate leaves to a policy, it is autocast like
  everywhere else: parameters are gathered and gradients reduced in FP32.
- FSDP2 works on a CPU, where Accelerate silently ignores its plugin.
- Whether a step is skipped is agreed on by all ranks. Sharded gradients overflow on one rank and not on another.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
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
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_periln import PeriLlamaForCausalLM
from modeling_periln.loss import softmax_part
from periln.runkit.fp16 import half_products, make_fp16_real
from periln.runkit.process import need_device
from periln.scripts.recipe import Recipe
from periln.scripts.training.zero import Zero, zero_stage

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
    need_device(asked, "device: cuda")
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


@dataclass(frozen=True)
class StepNumbers:
    """What the host learns of a step; `flag` is the largest that a rank gave."""

    loss: float
    norm: float
    loss_scale: float
    found_inf: bool
    flag: int


class Engine:
    """Accelerate for one run: `prepare`, then a forward and backward inside `arithmetic()`, then `step`."""

    def __init__(self, recipe: Recipe):
        precision, device = recipe.precision, pick_device(recipe.device)
        self._choose_algorithms(recipe.deterministic)
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
        self.half_products = make_fp16_real(self.accelerator, scaler)
        self._zero_scaler = None
        self._clip: tuple[float, torch.Tensor] | None = None  # that a step waits for, and the norm
        if self.zero:
            self.zero.adopt(self.accelerator)
            if precision.mode == "fp16":
                self._zero_scaler = torch.amp.GradScaler(device, **scaler)
                self.half_products = half_products() if device == "cpu" else nullcontext()
        if fsdp and device == "cpu" and self.processes > 1:
            self.accelerator.state.fsdp_plugin = plugin
            for state in (PartialState(), self.accelerator.state):  # the one is copied into the other now and then
                state.distributed_type = DistributedType.FSDP
        self._autocast_dtype = DTYPES.get(precision.mode)
        # Around what activation checkpointing computes once more; set by who must not see it twice.
        self.recomputing: Callable[[], AbstractContextManager] = nullcontext

    @staticmethod
    def _choose_algorithms(deterministic: bool) -> None:
        """Only algorithms that give the same bits each time, or any. Torch refuses an operator that has none such."""
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = False

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
            how: dict[str, Any] = {"use_reentrant": False}
            # A compiled layer that checkpoints its `forward` recomputes no statistics: nothing in the backward graph
            # reads them. Before Transformers 5.23 `__call__` was checkpointed: the compiled layer, hooks included.
            if not recipe.compile or "__call__" in vars(GradientCheckpointingLayer):
                how["context_fn"] = lambda: (nullcontext(), self.recomputing())
            enable(how)
        base = model.model
        self._compiled = [base.embed_norm, *base.layers, base.final_norm] if recipe.compile else []
        if recipe.compile:
            from periln.runkit.compiled import compile_options  # takes seconds to import

            options = compile_options(recipe.precision.mode, self.device.type)
            for module in self._compiled:
                module.compile(dynamic=False, options=options)
            if self.device.type != "cpu":  # there the operators, which work in place, are faster
                model.loss_softmax = torch.compile(softmax_part, dynamic=False, options=options)
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
        stack.enter_context(self.half_products)
        if self._autocast_dtype is not None and not self.zero:
            stack.enter_context(torch.autocast(self.device.type, dtype=self._autocast_dtype))
        return stack

    def uncompiled(self) -> AbstractContextManager:
        """Modules as they were before `compile`, so that hooks inside them are called."""
        stack = ExitStack()
        for module in self._compiled:
            compiled, module._compiled_call_impl = module._compiled_call_impl, None
            stack.callback(setattr, module, "_compiled_call_impl", compiled)
        return stack

    def no_sync(self, last: bool) -> AbstractContextManager:
        """Gradients are exchanged after the last micro batch only (under ZeRO after each: that is what it shards)."""
        if self.zero:
            self.zero.before_micro_batch(last, self.loss_scale)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.prepared)

    def unsynchronized(self) -> AbstractContextManager:
        """Around a forward pass that no backward pass will follow."""
        return nullcontext() if self.zero else self.accelerator.no_sync(self.prepared)

    def told_scale(self) -> torch.Tensor | None:
        """The loss scale on the device, for a loss that makes its gradient at once; None where it is not to do so.

        DeepSpeed's hooks gather the head's weight when the head is called, and the loss would not call it.
        """
        if self.zero:
            return None
        one = torch.ones((), device=self.device)
        return one if self.scaler is None else self.scaler.scale(one)

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
    def gradient_norm(self, clip: float | None) -> torch.Tensor:
        """Unscale the gradients; their 2-norm over the whole model, on the device. `step` will clip them to `clip`.

        `gradient_norms` has that of every parameter afterwards.
        """
        if self.zero:
            return torch.tensor(self._zero_step(), device=self.device)
        if self.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            self._agree_on_overflow()
        parameters = [p for _, p in self.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([p.grad for p in parameters]))
        norm = torch.linalg.vector_norm(norms)
        self._clip = None if clip is None else (clip, norm)
        self.gradient_norms = whole(norms).detach()
        return whole(norm).detach()

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

    def read(self, loss: torch.Tensor, norm: torch.Tensor, flag: int = 0) -> "StepNumbers":
        """A step's numbers on the host, in the one wait for the device that a step has.

        With a scaler its own `found_inf` says whether gradients overflowed: `step_was_skipped` misses fused AdamW, and
        a scale that has come down to 0 falls no more.
        """
        if self.zero:
            scale, found = torch.tensor(self.loss_scale), torch.tensor(float(self.zero.skipped))
        elif self.scaler is not None:
            states = self.scaler._per_optimizer_states.values()
            overflows = [whole(x) for state in states for x in state["found_inf_per_device"].values()]
            scale, found = self.scaler.scale(torch.ones((), device=self.device)), torch.stack(overflows).amax()
        else:
            scale, found = torch.ones(()), ~(loss.isfinite() & norm.isfinite())
        values = [loss, norm, scale, found, torch.tensor(flag)]
        values = torch.stack([value.to(self.device, torch.float32, non_blocking=True) for value in values])
        if self.processes > 1:
            dist.all_reduce(values[4:], dist.ReduceOp.MAX)
        loss, norm, scale, found, flag = values.tolist()
        return StepNumbers(loss, norm, scale, found > 0, int(flag))

    def _clip_gradients(self, norm: float) -> None:
        """As `torch.nn.utils.clip_grad_norm_`, but where the factor is 1 no gradient is read and written."""
        if self._clip is None:
            return
        (clip, total), self._clip = self._clip, None
        if 1 / (np.float32(norm) + np.float32(1e-6)) * np.float32(clip) >= 1:  # torch's own factor, to the last bit
            return
        gradients = [p for _, p in self.parameters() if p.grad is not None]
        nn.utils.clip_grads_with_norm_(gradients, clip, total)

    def step(self, skipped: bool, norm: float = math.inf) -> None:
        """Update the weights unless the step is skipped; either way the scale, and no gradients are left.

        `norm`: the gradients', as `read` gave it, so that the host need not wait for it again.
        """
        if self.zero:
            return
        # Not through the scaler nor Accelerate's wrapper: they would read `found_inf` once more.
        if not skipped:
            self._clip_gradients(norm)
            self.optimizer.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    # --- between ranks -----------------------------------------------------------------------------------
    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over ranks."""
        return self.accelerator.reduce(value, "mean")

    def gather(self, value: Any) -> list[Any]:
        """The small Python value of every rank, by rank."""
        values = [value] * self.processes
        if self.processes > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        self.accelerator.wait_for_everyone()
