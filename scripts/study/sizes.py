"""The sizes a study chooses from: shapes, batches, and the deep and narrow twin of each for E1."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from modeling_periln import PeriLlamaConfig
from periln.runkit.errors import UsageError, did_you_mean
from periln.scripts.costs import count_parameters, flops_per_token


@dataclass(frozen=True)
class Shape:
    """Layers, hidden size, heads, FFN width."""

    layers: int
    hidden: int
    heads: int
    ffn: int

    def model(self, length: int) -> dict[str, Any]:
        """The recipe's section `model`, without vocabulary and placement."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": length,
        }


@dataclass(frozen=True)
class Size:
    """A size by its name (parameters without embeddings), its step in sequences and tokens, and its vocabulary."""

    name: str
    shape: Shape
    deep: Shape
    batch: int
    length: int
    vocabulary: int

    @property
    def step_tokens(self) -> int:
        return self.batch * self.length

    def config(self, deep: bool = False) -> PeriLlamaConfig:
        shape = self.deep if deep else self.shape
        return PeriLlamaConfig(**shape.model(self.length), vocab_size=self.vocabulary, norm_placement="peri")

    @cache  # noqa: B019 (there are eight sizes)
    def cost(self, deep: bool = False) -> float:
        """FLOPs of a training token, and an allowance for small layers, whose kernels are all start.

        On a CPU core 16 layers of width 48 took 1.5 to 2.3 times as long a token as 8 of width 64, of equal FLOPs.
        """
        shape = self.deep if deep else self.shape
        return flops_per_token(self.config(deep), self.length) + 1e6 * shape.layers

    @cache  # noqa: B019
    def parameters(self, deep: bool = False) -> int:
        return count_parameters(self.config(deep)).non_embedding


SIZES = (
    Size("tiny", Shape(2, 32, 2, 64), Shape(4, 24, 2, 48), 4, 32, 300),
    Size("0.4M", Shape(8, 64, 2, 172), Shape(16, 48, 2, 128), 8, 128, 2048),
    Size("0.9M", Shape(8, 96, 3, 256), Shape(20, 64, 2, 172), 8, 128, 2048),
    Size("5M", Shape(12, 192, 6, 512), Shape(24, 128, 4, 344), 16, 256, 8192),
    Size("28M", Shape(16, 384, 6, 1024), Shape(32, 256, 4, 688), 32, 512, 16384),
    Size("95M", Shape(24, 576, 9, 1536), Shape(40, 448, 7, 1192), 64, 1024, 32768),
    Size("400M", Shape(24, 1024, 8, 4096), Shape(40, 800, 8, 3200), 128, 2048, 100352),
    Size("1.5B", Shape(24, 2048, 16, 7424), Shape(40, 1600, 16, 5632), 256, 2048, 100352),
)
SMALLEST = "0.4M"  # that a budget chooses; `tiny` is for trying the command out
NAMES = tuple(size.name for size in SIZES)


def size_of(name: str) -> Size:
    """A size by its name. Raises UsageError for an unknown one."""
    for size in SIZES:
        if size.name == name:
            return size
    raise UsageError(f"size {name!r} is unknown{did_you_mean(name, NAMES)}: use {', '.join(NAMES)}")


def larger(size: Size) -> Size | None:
    """The next size, or None."""
    at = NAMES.index(size.name) + 1
    return SIZES[at] if at < len(SIZES) else None
