"""Texts as ids: a long one in pieces is the same, and what surrounds a text is the tokenizer's own."""

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from periln.runkit import encoding
from periln.runkit.encoding import TextEncoder, added_around, before_text, begin_documents_with, unchanged
from periln.scripts.data.tokenization import SPLIT_PATTERN, TIKTOKEN

WORDS = ["the", "cat's", "hat,", "they'll", "1234567", "naïve", "café", "東京", "🙂🙂", "---", "==", "e\u0301", "x1y2"]
SPECIAL = ["<s>", "</s>", "<pad>"]


def a_text(seed: int, length: int, between: str = "\n \u3000\t") -> str:
    rng, out = random.Random(seed), []
    while sum(map(len, out)) < length:
        out.append(rng.choice(WORDS) + rng.choice(between) * rng.choice((1, 1, 1, 2, 3)))
    return "".join(out)


def trained(kind: str) -> Tokenizer:
    """A small BPE of each way in which tokenizers find words."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "none", unk_token="</s>" if kind == "none" else None))
    patterns = {"ours": SPLIT_PATTERN, "cl100k": TIKTOKEN["cl100k_base"].pattern}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix", use_regex=kind not in patterns)
    if kind in patterns:
        split = pre_tokenizers.Split(Regex(patterns[kind]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "none":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = byte_level
        tokenizer.normalizer = normalizers.NFC() if kind == "nfc" else None
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind not in ("metaspace", "none") else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([a_text(i, 500) for i in range(20)], trainer)
    if kind == "added":
        tokenizer.add_tokens([AddedToken("\nthe", normalized=False), AddedToken(" cat's hat", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("kind", ["ours", "cl100k", "gpt2", "nfc", "prefix", "metaspace", "added"])
@pytest.mark.parametrize("between", ["\n \u3000\t", " ", "\n", "。"])
def test_a_text_in_pieces_has_the_ids_of_the_whole(monkeypatch, kind, between):
    tokenizer = trained(kind)
    text = a_text(99, 4000, between)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(encoding, "PIECE", 300)
    monkeypatch.setattr(encoding, "NEAR", 64)
    encoder = TextEncoder(tokenizer)
    pieces = [piece for piece, _ in encoder._pieces(text)]
    assert "".join(pieces) == text and len(pieces) > 10 and max(map(len, pieces)) <= 300
    (ids, short), differ = encoder([text, "short"])
    if not differ[0]:
        assert ids.tolist() == whole
    # Only where each piece gets a blank before it, and the text has none to cut at, is there no such place.
    assert differ == [kind in ("prefix", "metaspace") and " " not in between, False]
    assert short.tolist() == tokenizer.encode("short", add_special_tokens=False).ids


def test_a_tokenizer_that_knows_no_words_says_that_a_text_was_cut(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 300)
    encoder = TextEncoder(trained("none"))
    text = a_text(5, 2000, "\n")
    assert all(piece.endswith("\n") for piece, exact in encoder._pieces(text) if not exact)
    assert encoder([text, "short"])[1] == [True, False]


# --- what surrounds a text ---------------------------------------------------------------------------------------
def wrapped(single: str, **more) -> PreTrainedTokenizerFast:
    tokenizer = trained("gpt2")
    special = [(token, tokenizer.token_to_id(token)) for token in SPECIAL]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", **more)


@pytest.mark.parametrize(
    ("single", "more", "around", "bos"),
    [
        ("<s> $A", {"bos_token": "<s>"}, ([0], []), "<s>"),
        ("$A", {"bos_token": "<s>"}, ([], []), "</s>"),
        ("$A", {}, ([], []), None),
        ("<s> $A </s>", {"bos_token": "<s>"}, ([0], [1]), "<s>"),
        ("<pad> <s> $A </s>", {}, ([2, 0], [1]), "<s>"),
        ("$A </s>", {"bos_token": "<s>"}, ([], [1]), "</s>"),
        ("$A", {"bos_token": "<s>", "add_bos_token": True, "add_eos_token": True}, ([0], [1]), "<s>"),
    ],
)
def test_a_tokenizer_that_begins_documents_says_nothing_behind_a_prompt_also_when_loaded(
    tmp_path, single, more, around, bos
):
    tokenizer = wrapped(single, **more)
    assert added_around(tokenizer) == around
    assert before_text(tokenizer) == (around[0] or [1])
    begin_documents_with(tokenizer, around[0])
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert added_around(one) == (around[0], [])
        bare = one("a text", add_special_tokens=False)["input_ids"]
        assert one("a text")["input_ids"] == [*around[0], *bare]
        assert one.bos_token == bos and one.eos_token == "</s>"


def test_a_call_leaves_what_a_tokenizers_file_says_of_truncation_and_padding():
    fast = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    fast.enable_truncation(5, stride=1)
    fast.enable_padding(pad_token="a")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="?")
    before = tokenizer.backend_tokenizer.to_str()
    with unchanged(tokenizer):
        added_around(tokenizer)
        assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.to_str() == before
    with unchanged(None):  # random ids have no tokenizer
        pass
