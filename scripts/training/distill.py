"""Training on another model's predictions (Hinton et al., 1503.02531, at temperature 1), and of some modules alone.

The loss of `distill_from` is the mean over tokens of KL(teacher || model), over the whole vocabulary. The teacher is in
every process, with FP32 weights, and reads the same tokens: nothing of it is in a checkpoint. It computes in the
model's precision, except beside a model in FP16, which the source may overflow: there in BF16 on a GPU that has it, and
otherwise in FP32.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from modeling_periln import PeriLlamaConfig
from periln.runkit.errors import UsageError, UserError
from periln.scripts.origin import find_origin, hash_of, load_weights
from periln.scripts.recipe import Recipe
from periln.scripts.training.engine import Engine

_OF_THE_LOSS = ("shift_labels", "num_items_in_batch", "z_loss", "skip_logits")  # no arguments of a model that is asked


def train_only(model: nn.Module, names: Sequence[str] | None) -> None:
    """Leave every parameter as it is but those of modules with these last names; None: train all."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names is None or name.split(".")[-2] in names)


class _Divergence(torch.autograd.Function):
    """Sum over tokens of KL(softmax(wanted) || softmax(logits)), and the cross entropy of `targets`.

    Its gradient, softmax(logits) - softmax(wanted), is made in the same pass, a sequence at a time, and takes the place
    of `wanted`. It stays in FP32 until the loss scale has been multiplied in.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes: logits (B, S, V), wanted (B, S, V) in FP32 (written to), targets (B, S); two scalars in FP32."""
        divergence, entropy = logits.new_zeros(2, dtype=torch.float32)
        for row, gradient, target in zip(logits, wanted, targets, strict=True):
            student = row.float().log_softmax(-1)
            entropy += nn.functional.nll_loss(student, target, reduction="sum")
            teacher = gradient.log_softmax(-1)
            gradient.copy_(teacher).exp_()
            divergence += teacher.sub_(student).mul_(gradient).sum()  # a dot product would be autocast to half
            torch.sub(student.exp_(), gradient, out=gradient)
            del student, teacher  # before the next sequence's are made
        ctx.gradient, ctx.dtype = wanted, logits.dtype
        ctx.mark_non_differentiable(entropy)
        return divergence, entropy

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore
        if ctx.gradient is None:
            raise RuntimeError("the gradient of the divergence was made in its forward pass, and has been used already")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(scale).to(ctx.dtype), None, None


class Teacher:
    """The model of `distill_from`, and the loss against it.

    Raises:
        UsageError: it has another vocabulary than the model, or the engine shards the model.
        UserError: its weights are damaged, or others than when the recipe was read.
    """

    def __init__(self, recipe: Recipe, config: PeriLlamaConfig, engine: Engine):
        assert recipe.distill_from is not None
        if engine.name not in ("single", "ddp"):
            raise UsageError(f"distill_from: {engine.name} shards the model; use one process, or several with DDP")
        origin = find_origin(recipe.distill_from, "distill_from")
        if origin.config.vocab_size != config.vocab_size:
            sizes = f"{origin.config.vocab_size} tokens, and the model {config.vocab_size}"
            raise UsageError(f"distill_from: {recipe.distill_from} has {sizes}")
        if hash_of(origin.checkpoint) != recipe.distill_sha256:
            raise UserError(f"distill_from: the weights of {origin.checkpoint} have changed since the recipe was read")
        model = load_weights(origin, "distill_from")
        model.config.residual_dtype = None
        self.model = model.requires_grad_(False).to(engine.device)
        self._wide = recipe.precision.mode == "fp16"
        self._bf16 = engine.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self._sum = torch.zeros((), device=engine.device)

    def losses(self, prepared: Callable[..., Any], arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The divergence of a micro batch, differentiable, and its cross entropy: this micro batch's share of the mean.

        Args:
            prepared: the model that is trained, as the engine wraps it.
            arguments: as for its own loss: input_ids and shift_labels (B, S), num_items_in_batch, ...
        """
        inputs = {name: value for name, value in arguments.items() if name not in _OF_THE_LOSS}
        targets, items = arguments["shift_labels"], arguments["num_items_in_batch"]
        logits = prepared(**inputs).logits
        with torch.no_grad(), self._precision(logits.device.type):
            wanted = self.model(**inputs).logits.float()
        divergence, entropy = _Divergence.apply(logits, wanted, targets)
        divergence = divergence / items
        self._sum += divergence.detach()
        return divergence, entropy / items

    def _precision(self, device: str) -> AbstractContextManager:
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self._bf16) if self._wide else nullcontext()

    def take(self) -> torch.Tensor:
        """The divergence summed since it was last taken."""
        found, self._sum = self._sum, torch.zeros_like(self._sum)
        return found
