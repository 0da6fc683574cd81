"""How far activations move in the first steps of training, by size of the model.

Tensors, each on one batch of random tokens that every step is trained on:

    embedding   the stream before the first layer
    attention   the output of the last layer's attention, before any output norm
    mlp         likewise of its MLP
    stream      the stream after the last layer
    logits      the model's output

Of each: `size`, the mean of |x|, and `change`, the mean of |x - x at step 0|, after every step. A rule that lets a rate
hold at any size keeps the change the same (2203.03466, appendix D; 2310.02244, section 4).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from modeling_periln import PeriLlamaForCausalLM
from periln.runkit.errors import UsageError
from periln.runkit.recipes import from_mapping, to_mapping
from periln.scripts.parametrization import DEPTH_RULES, Parametrization, scale_initial_weights
from periln.scripts.recipe import Recipe
from periln.scripts.training.steps import make_optimizer, scales_of, set_rate

TENSORS = ("embedding", "attention", "mlp", "stream", "logits")
# In depth a layer's own share may shrink with the number of layers; what they sum to may not.
JUDGED = {"width": TENSORS[1:], "depth": ("stream", "logits")}


def recipe_of(base: Recipe, rule: str, width: int, depth: int, base_size: tuple[int, int], vocabulary: int) -> Recipe:
    """The recipe at another width and depth under a rule: heads of the same size, an FFN of the same shape.

    Raises:
        UsageError: a width that is not a multiple of a head, or what the rule refuses.
    """
    config = base.model_config(vocab_size=vocabulary)
    head, heads, pairs = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    assert head and pairs  # the configuration fills them in
    if width % head:
        raise UsageError(f"--widths {width} is not a multiple of the recipe's head, {head}: set model.head_dim")
    groups = max(1, heads // pairs)
    count = width // head
    model = base.model | {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": count,
        "num_key_value_heads": count // groups if count % groups == 0 else count,
        "intermediate_size": max(1, round(config.intermediate_size * width / config.hidden_size)),
        "vocab_size": vocabulary,
    }
    rules = Parametrization(rule=rule)  # type: ignore[arg-type]
    if rule != "standard":
        rules.base_width = base.parametrization.base_width or base_size[0]
        rules.base_depth = (base.parametrization.base_depth or base_size[1]) if rule in DEPTH_RULES else None
    fields = to_mapping(replace(base, model=model, parametrization=rules))
    fields["precision"] = {"mode": "fp32", "residual_dtype": None}
    recipe = from_mapping(Recipe, fields)
    recipe.check()
    return recipe


class Watch:
    """Hooks at the tensors; `seen` has those of the last forward pass."""

    def __init__(self, model: PeriLlamaForCausalLM):
        self.seen: dict[str, torch.Tensor] = {}
        base = model.model
        last: Any = base.layers[-1]
        places = {"embedding": base.embed_norm, "attention": last.self_attn, "mlp": last.mlp, "stream": last}
        for name, module in (places | {"logits": model.lm_head}).items():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.seen[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook


def measure(recipe: Recipe, steps: int, shape: tuple[int, int], seed: int) -> Iterator[dict[str, Any]]:
    """Rows of (step, tensor, size, change) of one model, for steps 0 to `steps`."""
    torch.manual_seed(seed)
    config = recipe.model_config()
    model = PeriLlamaForCausalLM(config)
    kinds = scales_of(recipe, config)
    if kinds:
        scale_initial_weights(model, kinds)
    optimizer = make_optimizer(model, recipe.optimizer, kinds)
    set_rate(optimizer, recipe.optimizer.learning_rate)
    ids = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    watch, first = Watch(model), dict[str, torch.Tensor]()
    model.train()
    for step in range(steps + 1):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        first = first or dict(watch.seen)
        for name in TENSORS:
            x = watch.seen[name]
            change = (x - first[name]).abs().mean().item()
            yield {"step": step, "tensor": name, "size": x.abs().mean().item(), "change": change}
        if step < steps:
            loss.backward()
            if recipe.optimizer.gradient_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(
                    list(model.parameters()),
                    recipe.optimizer.gradient_clip,
                    torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]),
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def power(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log(values) over log(sizes): 0 where the size does not matter."""
    if not all(0 < value < float("inf") for value in values):
        return float("inf")
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def verdicts(rows: list[dict[str, Any]], tolerance: float) -> list[dict[str, Any]]:
    """For every rule and axis: the power of the size in each tensor's change after the last step; whether it passes.

    `rows` have rule, axis, size_of_model, seed, step, tensor, size, change.
    """
    found = []
    last = max(row["step"] for row in rows)
    for rule, axis in dict.fromkeys((row["rule"], row["axis"]) for row in rows):
        here = [row for row in rows if (row["rule"], row["axis"], row["step"]) == (rule, axis, last)]
        sizes = sorted({row["size_of_model"] for row in here})
        powers, changes = {}, {}
        for tensor in TENSORS:
            changes[tensor] = [
                float(
                    np.exp(
                        np.mean(
                            [
                                np.log(max(row["change"], 1e-30))
                                for row in here
                                if row["tensor"] == tensor and row["size_of_model"] == size
                            ]
                        )
                    )
                )
                for size in sizes
            ]
            powers[tensor] = power(sizes, changes[tensor])
        passes = all(abs(powers[tensor]) <= tolerance for tensor in JUDGED[axis])
        found.append(
            {"rule": rule, "axis": axis, "sizes": sizes, "powers": powers, "changes": changes, "passes": passes}
        )
    return found
