"""Loss on held-out text: nats a token with a standard error, and bits a byte."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runkit.errors import UserError


def read_texts(path: Path) -> list[str]:
    """The `text` of every line of a .jsonl file.

    Raises:
        UserError: unreadable, not JSON, or no text in it.
    """
    try:
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read held-out texts from {path}: {error}") from error
    if not any(texts):
        raise UserError(f"{path} holds no text")
    return texts


@torch.no_grad()
def heldout_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], context: int, batch_size: int
) -> dict[str, Any]:
    """Mean next-token loss over all tokens of `texts`, document by document.

    Each document starts after the end-of-text token and is cut into windows of `context` tokens that do not
    overlap (a window's first token is predicted from the last of the window before). The standard error is that
    of a ratio of sums over documents: residuals of each document's loss from the mean, by its token count.

    Returns:
        results (loss in nats a token, bits_per_byte), tokens, bytes, documents, context.
    """
    windows, owners = [], []
    for number, text in enumerate(texts):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for start in range(0, len(ids) - 1, context):
            windows.append(ids[start : start + context + 1])
            owners.append(number)
    sums, counts = torch.zeros(len(texts), dtype=torch.float64), torch.zeros(len(texts), dtype=torch.float64)
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(windows[chosen[0]])
        padded = torch.tensor([windows[i] + [-1] * (longest - len(windows[i])) for i in chosen], device=model.device)
        inputs, targets = padded[:, :-1].clamp(min=0), padded[:, 1:]
        # Right padding needs no mask: attention is causal, and padded positions are not counted.
        logits = model(input_ids=inputs, use_cache=False).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        losses, real = losses.view_as(targets).double().sum(1).cpu(), (targets != -1).sum(1).double().cpu()
        index = torch.tensor([owners[i] for i in chosen])
        sums.index_add_(0, index, losses)
        counts.index_add_(0, index, real)
    tokens, nats, size = counts.sum().item(), sums.sum().item(), sum(len(t.encode()) for t in texts)
    loss, n = nats / tokens, len(texts)
    residuals = (sums - loss * counts).square().sum().item()
    stderr = math.sqrt(n / (n - 1) * residuals) / tokens if n > 1 else None
    bits = nats / math.log(2) / size
    results = [
        {"task": "heldout", "metric": "loss", "value": loss, "stderr": stderr, "n": n},
        {"task": "heldout", "metric": "bits_per_byte", "value": bits, "stderr": None, "n": n},
    ]
    return {"results": results, "tokens": int(tokens), "bytes": size, "documents": n, "context": context}
