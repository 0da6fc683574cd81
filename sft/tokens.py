"""Conversations as tokens: what the loss counts, what is cut off, and what is left out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from periln.runkit.control_tokens import (
    END_OF_TURN,
    check_control_tokens,
    control_tokens,
    ignore_joiners,
    ignores_joiners,
)
from periln.runkit.encoding import added_around
from periln.runkit.errors import UsageError, UserError
from periln.sft.chat_template import chat_template
from periln.sft.conversations import Conversations

IGNORED = -100


def chat_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer with our chat template instead of its own, if it has one.

    Raises:
        UserError: no tokenizer, or one that lacks the tokens of the template or could take content for a control
            token; names the checkpoint.
    """
    if not (checkpoint / "tokenizer_config.json").exists():
        raise UsageError(f"{checkpoint} has no tokenizer (tokenizer_config.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # a missing or damaged tokenizer.json fails in many ways
        raise UserError(
            f"the tokenizer of {checkpoint} cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    check_control_tokens(tokenizer, checkpoint)
    # A tokenizer that Transformers rebuilds from its vocabulary, whatever tokenizer.json says, would lose it again.
    if type(tokenizer) is PreTrainedTokenizerFast and not ignores_joiners(tokenizer):
        ignore_joiners(tokenizer.backend_tokenizer, control_tokens(tokenizer))
    begin = "".join(tokenizer.convert_ids_to_tokens(added_around(tokenizer)[0]))
    # Libraries add no special token to what a template has rendered: so the template writes what begins a document.
    tokenizer.chat_template = (f"{{{{- {json.dumps(begin)} -}}}}" if begin else "") + chat_template(tokenizer)
    return tokenizer


def knows_turns(checkpoint: Path) -> bool:
    """Whether a checkpoint has been trained on conversations with our tokens: its own chat template writes them."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return END_OF_TURN in json.dumps(tokenizer.chat_template or "")


@dataclass
class Tokens:
    """Conversations as they are trained on: `ids` and `labels` (IGNORED where no loss is taken), a list each.

    `truncated` are the rows whose end is cut off, `dropped` those without any assistant's token left.
    """

    ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """For summary.json: what was trained on, and how many conversations were cut or left out."""
        trained = sum(label != IGNORED for row in self.labels for label in row)
        head = {"conversations": len(self.ids), "assistant_tokens": trained, "all_tokens": sum(map(len, self.ids))}
        return head | {"truncated": len(self.truncated), "dropped": len(self.dropped)}


def tokenize(conversations: Conversations, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """What TRL makes of the conversations (its truncation keeps the start), with the rows it cuts and drops.

    Raises:
        UserError: nothing is left to train on.
    """
    tokens = Tokens()
    for row, messages in zip(conversations.rows, conversations.messages, strict=True):
        out = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
        )
        ids, mask = out["input_ids"][:max_length], out["assistant_masks"][:max_length]
        if not any(mask):
            tokens.dropped.append(row)
            continue
        if len(out["input_ids"]) > max_length:
            tokens.truncated.append(row)
        tokens.ids.append(ids)
        tokens.labels.append([i if kept else IGNORED for i, kept in zip(ids, mask, strict=True)])
    if not tokens.ids:
        raise UserError(f"{conversations.name}: no answer begins within max_length {max_length}; nothing to train on")
    return tokens


def marked(tokens: Tokens, tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[str]:
    """The first conversations as text, with >>> and <<< around what the loss counts."""
    for ids, labels in zip(tokens.ids[:count], tokens.labels[:count], strict=True):
        text, run, trained = "", [], False
        for token, label in [*zip(ids, labels, strict=True), (None, None)]:
            if token is None or (label != IGNORED) != trained:
                piece = tokenizer.decode(run)
                text += f">>>{piece}<<<" if trained else piece
                run, trained = [], not trained
            run.append(token)
        yield text
