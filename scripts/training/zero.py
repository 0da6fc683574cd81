"""DeepSpeed's ZeRO-2 and ZeRO-3 for the engine, with the arithmetic of the other engines.

The launcher asks for it (scripts/launch/deepspeed_zero2.yaml). DeepSpeed shards and communicates; what decides the
numbers stays the recipe's:

- Parameters, gradients and their reduction are FP32, products are autocast. DeepSpeed switches off an autocast that
  it finds around its engine, so it is around the model's own forward pass here.
- The loss scale is that of `torch.amp.GradScaler`, handed to DeepSpeed before each backward pass: its own FP16 mode
  would keep weights in FP16, and has other rules for growth.
- Accelerate silently ignores the plugin on a CPU; `adopt` corrects that, as the engine does for FSDP2.
"""

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import DistributedType, is_deepspeed_available, parse_flag_from_env
from torch import nn

from periln.runkit.errors import UsageError
from periln.scripts.optimizers import find_row
from periln.scripts.recipe import Recipe


def zero_stage() -> int | None:
    """The stage that the launcher asked for, 2 or 3; None without DeepSpeed.

    Raises:
        UsageError: another stage, offloading, a configuration of DeepSpeed's own, or no DeepSpeed to be found.
    """
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return None
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise UsageError("deepspeed_config_file: give zero_stage alone; all else is the recipe's to say")
    for what in ("OPTIMIZER", "PARAM"):
        asked = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none")
        if asked != "none":
            raise UsageError(f"offload_{what.lower()}_device {asked}: this trainer does not offload")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("2", "3"):
        raise UsageError(f"zero_stage {stage}: this trainer runs DeepSpeed's stages 2 and 3")
    if not is_deepspeed_available():
        raise UsageError("DeepSpeed was asked for, but is not installed: pip install deepspeed")
    return int(stage)


def check_zero(recipe: Recipe, processes: int) -> None:
    """Raise UsageError for what DeepSpeed, where it is asked for, is not to do here."""
    if zero_stage() is None:
        return
    if processes == 1:
        raise UsageError("DeepSpeed was asked for one process: it shards over several")
    if reason := find_row(recipe.optimizer.name).refused.get(f"zero{zero_stage()}"):
        raise UsageError(f"optimizer.name {recipe.optimizer.name}: not with DeepSpeed's ZeRO: {reason}")
    if recipe.parametrization.rule != "standard":
        rule = recipe.parametrization.rule
        raise UsageError(f"parametrization.rule {rule}: not with DeepSpeed, whose groups have one rate and epsilon")
    if recipe.deterministic:
        raise UsageError("deterministic: not with DeepSpeed, whose reductions are its own")
    if recipe.compile:
        raise UsageError("compile: not with DeepSpeed, whose hooks are inside the compiled layers: --set compile=false")


class Zero:
    """One model and optimizer under ZeRO; all methods are called on all ranks."""

    def __init__(self, stage: int, recipe: Recipe):
        self.stage, self.skipped = stage, False
        clip = recipe.optimizer.gradient_clip
        config = {
            "train_micro_batch_size_per_gpu": 1,  # a name only: batches are the trainer's
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip or 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**12,
        }
        # `accelerate launch` lists here what its file says about DeepSpeed, and the plugin refuses that combination.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        self.plugin = DeepSpeedPlugin(hf_ds_config=config)

    def adopt(self, accelerator: Accelerator) -> None:
        """Make an Accelerator that runs on CPUs use the plugin."""
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return
        accelerator.state.deepspeed_plugins = {"default": self.plugin}
        self.plugin.select(_from_accelerator_state=True)
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.DEEPSPEED

    def prepare(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None
    ) -> tuple[Any, Any]:
        """DeepSpeed's engine and Accelerate's wrapper of its optimizer; `dtype`: of autocast."""
        forward, device = model.forward, accelerator.device

        def autocast_forward(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                return forward(*args, **kwargs)

        model.forward = autocast_forward
        self.device, self.model = device, model
        self.engine, wrapped = accelerator.prepare(model, optimizer)
        self.optimizer = self.engine.optimizer
        return self.engine, wrapped

    # --- a step ------------------------------------------------------------------------------------------
    def before_micro_batch(self, last: bool, loss_scale: float) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.optimizer.override_loss_scale(loss_scale)

    def gradient_parts(self) -> list[tuple[str, int, torch.Tensor]]:
        """(parameter, entries, this rank's part of its gradient, flat); scaled, after the last backward pass."""
        parts = []
        for name, parameter in self._learnable():
            if self.stage == 3:
                part, entries = self.optimizer.get_local_fp32_grad_for_param(parameter), parameter.ds_numel
            else:
                part, entries = self._fragment(parameter), parameter.numel()
            parts.append((name, entries, part.flatten()))
        return parts

    def _fragment(self, parameter: nn.Parameter) -> torch.Tensor:
        mapping = parameter._hp_mapping
        if mapping is None:  # another rank's
            return torch.zeros(0, device=self.device)
        part, address = mapping.get_lp_grad_fragment(parameter._index_in_param_group), mapping.lp_fragment_address
        return part if part.numel() == address.numel else part.flatten().narrow(0, address.start, address.numel)

    def step(self, scaler: torch.amp.GradScaler | None) -> float:
        """Clip and update, unless gradients are not finite (`skipped`); their norm before clipping, unscaled."""
        self.engine.step()
        self.skipped = bool(self.optimizer.overflow)
        if scaler is not None:
            found = scaler.scale(torch.tensor(float(self.skipped), device=self.device)).clamp(max=1.0)
            scaler._per_optimizer_states[id(self)]["found_inf_per_device"] = {self.device: found}
            scaler.update()
        return math.inf if self.skipped else float(self.engine.get_global_grad_norm())

    # --- whole tensors -----------------------------------------------------------------------------------
    def _learnable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def whole(self, parameter: nn.Parameter) -> torch.Tensor:
        """A parameter in one piece."""
        if not hasattr(parameter, "ds_id"):
            return parameter.detach()
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def moments(self, keep: bool) -> dict[str, torch.Tensor]:
        """The optimizer's state by parameter, on the CPU, on ranks that `keep` it; empty before the first update."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states, tensors = list(self.optimizer.optimizer.state.values()), {}
        if not states or "step" not in states[0]:
            return {}
        self._link_states()
        for name, parameter in self._learnable():
            for key in ("exp_avg", "exp_avg_sq"):
                value = safe_get_full_optimizer_state(parameter, key)
                if keep:
                    tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
            if keep:
                tensors[f"{name}/step"] = states[0]["step"].detach().cpu().clone()
        return tensors

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor], moments: dict[str, dict[str, torch.Tensor]]) -> None:
        """Put whole weights and optimizer state back, cut as this rank holds them."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if moments:
            self._make_states(next(iter(moments.values()))["step"])
        for name, parameter in self.model.named_parameters():
            value = weights[name].to(self.device)
            self._set_whole(parameter, value)
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value)
                for key in ("exp_avg", "exp_avg_sq") if moments else ():
                    safe_set_full_optimizer_state(parameter, moments[name][key].to(self.device), key)

    def _set_whole(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        if self.stage == 2:
            parameter.copy_(value)
            return
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.copy_(value)

    def _make_states(self, step: torch.Tensor) -> None:
        """What AdamW makes in its first step: DeepSpeed has nowhere to put a state before."""
        stage_2 = self.stage == 2
        flats = (
            self.optimizer.single_partition_of_fp32_groups if stage_2 else self.optimizer.fp32_partitioned_groups_flat
        )
        for flat in flats:
            self.optimizer.optimizer.state[flat] = {
                "step": step.clone().to(flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self._link_states()

    def _link_states(self) -> None:
        """ZeRO-2 finds a parameter's state by links that it makes after the first group's first update: too early for
        the second group's.
        """
        if self.stage == 2:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
