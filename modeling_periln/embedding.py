"""The embedding table where its rows are multiplied by a number (`embedding_multiplier`; Gemma, Granite)."""

import torch
from torch import nn
from transformers import initialization as init


class PeriLlamaScaledEmbedding(nn.Embedding):
    """A table whose rows are multiplied when they are read, so that a tied head sees them unscaled.

    The factor is rounded to the weights' dtype before it multiplies, as in Gemma.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, multiplier: float):
        super().__init__(num_embeddings, embedding_dim)
        self.multiplier = float(multiplier)
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.tensor(self.multiplier), persistent=False)

    def reset_scale(self) -> None:
        """No checkpoint holds the buffer: it is made again after loading."""
        init.constant_(self.scale, self.multiplier)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.scale.to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, multiplier={self.multiplier}"


def build_embedding(vocab_size: int, hidden_size: int, multiplier: float) -> nn.Embedding:
    """The table; a plain one for a multiplier of 1. No padding_idx: with pad = eos it would keep the document
    separator's row at zero.
    """
    if multiplier == 1:
        return nn.Embedding(vocab_size, hidden_size)
    return PeriLlamaScaledEmbedding(vocab_size, hidden_size, multiplier)
