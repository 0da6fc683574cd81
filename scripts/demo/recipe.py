"""The demo's recipe, and the recipes of the stages that follow from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modeling_periln import PLACEMENT_NAMES
from periln.runkit.errors import UsageError, did_you_mean
from periln.runkit.resume import BITS, NOTHING, PLACE, setting
from periln.scripts.data.corpus import INSTALLED
from periln.scripts.data.tokenization import check_vocab_size
from periln.scripts.recipe import Recipe


@dataclass
class Text:
    """Where the text comes from, and how much of it."""

    source: str = setting(decides=PLACE)  # prepare_data finds out whether the text is the same
    max_bytes: int
    heldout_share: float


@dataclass
class Tokenizer:
    """The byte-level BPE trained on the text."""

    vocab_size: int


@dataclass
class Pretraining:
    """What all runs of the demo share."""

    steps: int
    batch_size: int
    sequence_length: int
    loss_scale_growth_interval: int
    layer_stats_every: int
    checkpoint_every: int = setting(decides=NOTHING)


@dataclass
class Evaluation:
    """`mini`: our own items; `hub`: the real tasks, `limit` items each (null: all)."""

    suite: Literal["mini", "hub"]
    limit: int | None
    batch_size: int


@dataclass
class FineTuning:
    """`mini`: our own conversations; `hub`: the real GAIR/lima."""

    data: Literal["mini", "hub"]
    epochs: int
    batch_size: int
    learning_rate: float
    max_length: int


@dataclass
class DemoRecipe:
    """Everything that decides a demo."""

    stage: Literal["demo"]
    device: Literal["cpu", "cuda"] = setting(decides=BITS)
    placements: list[str]
    seeds: list[int]
    learning_rate: float
    high_learning_rate: float
    high_learning_rate_seeds: list[int]
    text: Text
    tokenizer: Tokenizer
    model: dict[str, Any]
    pretraining: Pretraining
    evaluation: Evaluation
    sft: FineTuning

    def check(self) -> None:
        """Find every mistake before any work starts.

        Raises:
            UsageError: names field and value.
        """
        check_vocab_size(self.tokenizer.vocab_size)
        for name in self.placements:
            if name not in PLACEMENT_NAMES:
                known = ", ".join(PLACEMENT_NAMES)
                raise UsageError(f"placements: {name!r} is unknown{did_you_mean(name, PLACEMENT_NAMES)}: use {known}")
        for field in ("placements", "seeds"):
            values = getattr(self, field)
            if not values or len(set(values)) != len(values):
                raise UsageError(f"{field} must name at least one, and none twice, not {values}")
        if self.high_learning_rate == self.learning_rate:
            raise UsageError(f"high_learning_rate must differ from learning_rate {self.learning_rate}")
        if self.text.source != INSTALLED and not Path(self.text.source).exists():
            raise UsageError(f"no text found: text.source {self.text.source} does not exist")
        if self.evaluation.limit is not None and self.evaluation.limit < 1:
            raise UsageError(f"evaluation.limit must be at least 1, or null for all, not {self.evaluation.limit}")
        if self.evaluation.batch_size < 1:
            raise UsageError(f"evaluation.batch_size must be at least 1, not {self.evaluation.batch_size}")
        for field in ("epochs", "batch_size", "max_length"):
            if getattr(self.sft, field) < 1:
                raise UsageError(f"sft.{field} must be at least 1, not {getattr(self.sft, field)}")
        if self.sft.learning_rate <= 0:
            raise UsageError(f"sft.learning_rate must be above 0, not {self.sft.learning_rate}")
        if len(set(self.high_learning_rate_seeds)) != len(self.high_learning_rate_seeds):
            raise UsageError(f"high_learning_rate_seeds names one twice: {self.high_learning_rate_seeds}")
        if not 0 < self.text.heldout_share < 1 or self.text.max_bytes < 1:
            values = f"{self.text.heldout_share} and {self.text.max_bytes}"
            raise UsageError(f"text.heldout_share lies between 0 and 1 and text.max_bytes is at least 1, not {values}")
        if self.sft.max_length > self.model.get("max_position_embeddings", self.sft.max_length):
            raise UsageError(f"sft.max_length {self.sft.max_length} exceeds model.max_position_embeddings")
        for cell in self.cells(Path("data")):
            cell.check()

    def cells(self, data: Path) -> list[Recipe]:
        """The pretraining runs: every placement and seed at the base rate, then those at the high one.

        The runs of one seed read the same tokens in the same order and start from the same shared weights.
        """
        plan = [(self.learning_rate, seed) for seed in self.seeds]
        plan += [(self.high_learning_rate, seed) for seed in self.high_learning_rate_seeds]
        return [self._cell(data, name, rate, seed) for rate, seed in plan for name in self.placements]

    def _cell(self, data: Path, placement: str, rate: float, seed: int) -> Recipe:
        shared = self.pretraining
        recipe = Recipe(
            name=f"{placement}_lr{rate:g}_seed{seed}",
            data=str(data),
            model={**self.model, "norm_placement": placement},
            steps=shared.steps,
            batch_size=shared.batch_size,
            sequence_length=shared.sequence_length,
            seed=seed,
            device=self.device,
            layer_stats_every=shared.layer_stats_every,
            checkpoint_every=shared.checkpoint_every,
            trackers=[],
        )
        recipe.optimizer.learning_rate = rate
        recipe.precision.loss_scale_growth_interval = shared.loss_scale_growth_interval
        return recipe

    def sft_recipe(self) -> dict[str, Any]:
        """The fine-tuning stage's recipe file."""
        fields = ("data", "epochs", "batch_size", "learning_rate", "max_length")
        return {field: getattr(self.sft, field) for field in fields} | {"device": self.device}
