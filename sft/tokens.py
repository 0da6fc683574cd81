"""Conversations as tokens: what the loss counts, what is cut off, and what is left out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

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
from periln.sft.own_template import AnswerJoined, own_template

IGNORED = -100


def chat_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer: as it is with a chat template of its own, and otherwise with ours.

    Raises:
        UserError: no tokenizer, one that lacks the tokens of our template or could take content for a control token,
            or a template of its own that cannot be trained with; names the checkpoint.
    """
    if not (checkpoint / "tokenizer_config.json").exists():
        raise UsageError(f"{checkpoint} has no tokenizer (tokenizer_config.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # a missing or damaged tokenizer.json fails in many ways
        raise UserError(
            f"the tokenizer of {checkpoint} cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    if own_template(tokenizer) is not None:
        return tokenizer
    check_control_tokens(tokenizer, checkpoint)
    # A tokenizer that Transformers rebuilds from its vocabulary, whatever tokenizer.json says, would lose it again.
    if type(tokenizer) is PreTrainedTokenizerFast and not ignores_joiners(tokenizer):
        ignore_joiners(tokenizer.backend_tokenizer, control_tokens(tokenizer))
    begin = "".join(tokenizer.convert_ids_to_tokens(added_around(tokenizer)[0]))
    # Libraries add no special token to what a template has rendered: so the template writes what begins a document.
    tokenizer.chat_template = (f"{{{{- {json.dumps(begin)} -}}}}" if begin else "") + chat_template(tokenizer)
    return tokenizer


def knows_turns(checkpoint: Path) -> bool:
    """Whether a checkpoint has been trained on conversations: it has a chat template of its own, or has ours."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return own_template(tokenizer) is not None or END_OF_TURN in json.dumps(tokenizer.chat_template or "")


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends an answer: of the tokenizer's own chat template, or else of ours."""
    own = own_template(tokenizer)
    end: int = tokenizer.convert_tokens_to_ids(END_OF_TURN) if own is None else own.end
    return end


def stop_at_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have generation end where the tokenizer's own chat template ends an answer; for ours `write_checkpoint` does."""
    if own_template(tokenizer) is not None:
        found, end = model.generation_config.eos_token_id, turn_end(tokenizer)
        known = found if isinstance(found, list) else [] if found is None else [found]
        if end not in known:
            model.generation_config.eos_token_id = [*known, end]


@dataclass
class Tokens:
    """Conversations as they are trained on: `ids` and `labels` (IGNORED where no loss is taken), a list each.

    `truncated` are the rows whose end is cut off, `dropped` those without any assistant's token left, and `joined`
    those of them (none with our chat template) where no token of the prompt ends before the answer.
    """

    ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    joined: list[int] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """For summary.json: what was trained on, and how many conversations were cut or left out."""
        trained = sum(label != IGNORED for row in self.labels for label in row)
        head = {"conversations": len(self.ids), "assistant_tokens": trained, "all_tokens": sum(map(len, self.ids))}
        return head | {"truncated": len(self.truncated), "dropped": len(self.dropped)}


def _by_ours(tokenizer: PreTrainedTokenizerBase, messages: list[dict], where: str) -> tuple[list[int], list[int]]:
    """The ids of a conversation by our chat template, and a mask: 1 where the loss is taken."""
    out = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    return out["input_ids"], out["assistant_masks"]


def tokenize(conversations: Conversations, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """What TRL makes of the conversations (its truncation keeps the start), with the rows it cuts and drops.

    Raises:
        UserError: nothing is left to train on, or the tokenizer's own template does not write a row so that what the
            loss counts is certain.
    """
    tokens, read = Tokens(), own_template(tokenizer) or partial(_by_ours, tokenizer)
    for row, messages in zip(conversations.rows, conversations.messages, strict=True):
        try:
            all_ids, all_mask = read(messages, f"{conversations.name}, row {row}")
        except AnswerJoined as error:
            if len(tokens.joined) + 1 == len(conversations):
                raise error
            tokens.dropped.append(row)
            tokens.joined.append(row)
            continue
        ids, mask = all_ids[:max_length], all_mask[:max_length]
        if not any(mask):
            tokens.dropped.append(row)
            continue
        if len(all_ids) > max_length:
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
