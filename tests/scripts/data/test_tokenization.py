"""Tokenizers: nothing is lost, and a converted tiktoken vocabulary gives tiktoken's ids."""

import base64
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from periln.runkit.errors import UsageError, UserError
from periln.scripts.data.encoders import Encoder
from periln.scripts.data.tokenization import (
    ROLES,
    SPECIAL_TOKENS,
    TIKTOKEN,
    TiktokenEncoding,
    convert_tiktoken,
    load_tokenizer,
    read_ranks,
    train_tokenizer,
    vocabulary_size,
)

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
CL100K = TIKTOKEN["cl100k_base"]
# tiktoken's own pattern, for the `regex` module, which reads its quantifiers as tiktoken does
ORIGINAL = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
TRICKY = " \t\r\n\u3000\x85\xa0'sSſ\u017ftTrReEvVdDmMlL01²½٣aé漢🙂.!<|>\x00"
TEXT = (
    "the cat's hat, they'll sit THERE'S 1234567 times\n\n\n  aaaaabaaab in the naïve café of 東京 🙂🙂 lolol 1111111 "
    * 3
)


def byte_ranks(count: int) -> dict[bytes, int]:
    """A small vocabulary of our own, trained as tiktoken's are: merge the most frequent pair, again and again."""
    ranks = {bytes([i]): i for i in range(256)}
    pieces = [[bytes([b]) for b in piece.encode()] for piece in regex.findall(ORIGINAL, TEXT)]
    while len(ranks) < count:
        pairs = {}
        for piece in pieces:
            for pair in pairwise(piece):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(sorted(pairs), key=pairs.__getitem__)
        ranks.setdefault(best[0] + best[1], len(ranks))
        for piece in pieces:
            for i in range(len(piece) - 2, -1, -1):
                if tuple(piece[i : i + 2]) == best:
                    piece[i : i + 2] = [best[0] + best[1]]
    return ranks


def slow_ids(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm, word for word: in each piece merge the neighbours of lowest rank until none is left."""
    ids = []
    for piece in regex.findall(ORIGINAL, text):
        data = piece.encode()
        parts = [data] if data in ranks else [bytes([b]) for b in data]
        while True:
            known = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not known:
                break
            _, i = min(known)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    everything = [chr(i) for i in range(0x30000) if not 0xD800 <= i < 0xE000]
    texts = ["".join(rng.choice(TRICKY) for _ in range(rng.randint(1, 40))) for _ in range(count)]
    texts += ["".join(rng.choice(everything) for _ in range(20)) for _ in range(count)]
    texts += ["".join(rng.choice("abelost '") for _ in range(30)) for _ in range(count)]
    return [*texts, TEXT, "", "a" * 300, "\n" * 99, "1" * 50, "<|endoftext|> is text <|user|>"]


def encoder(tokenizer, folder) -> Encoder:
    tokenizer.save_pretrained(folder)
    return Encoder(folder / "tokenizer.json", [], [tokenizer.eos_token_id], np.dtype("<u4"))


def ids_of(encode: Encoder, texts: list[str]) -> list[list[int]]:
    ids, lengths, _ = encode(texts)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def test_any_text_survives_the_tokenizer():
    tokenizer = train_tokenizer(["some text to learn merges from, some text"], 270, 64)
    for text in ("héllo\x00 wörld\r\n\t", "漢字🙂", "  two  spaces 12345 "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UsageError, match="vocab_size 256 is smaller than the 256 bytes and 5 special tokens"):
        train_tokenizer(["x"], 256, 64)


def test_special_tokens_written_in_a_text_are_text_and_every_document_has_one_end(tmp_path):
    tokenizer = train_tokenizer(["some text"], 270, 64)
    tokenizer.backend_tokenizer.enable_truncation(3)  # as a tokenizer of the Hub may ask for in its file
    tokenizer.backend_tokenizer.enable_padding(length=9)
    texts = ["a <|end_of_text|> b", "", "<|user|>"]
    for text, ids in zip(texts, ids_of(encoder(tokenizer, tmp_path), texts), strict=True):
        assert ids[-1] == tokenizer.eos_token_id and min(ids[:-1], default=9) >= len(SPECIAL_TOKENS)
        assert tokenizer.decode(ids[:-1]) == text


@pytest.mark.parametrize("gaps", ["wide", "none"])
def test_a_converted_vocabulary_has_every_id_of_tiktokens_and_fills_the_gaps(tmp_path, gaps):
    ranks = byte_ranks(300)
    special = {"<|endoftext|>": 301, "<|fim|>": 302, "<|endofprompt|>": 320 if gaps == "wide" else 303}
    encoding = TiktokenEncoding(CL100K.pattern, special, "<|endoftext|>")
    tokenizer = convert_tiktoken(ranks, encoding, 64)
    texts = random_texts(150)
    for text, ids in zip(texts, ids_of(encoder(tokenizer, tmp_path), texts), strict=True):
        assert ids == [*slow_ids(text, ranks), 301]
        assert tokenizer.decode(ids[:-1]) == text
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert {name: names.index(name) for name in special} == special
    assert len(tokenizer) == vocabulary_size(tokenizer) == (321 if gaps == "wide" else 308)
    assert len(set(names)) == len(names) and names[300] == "<|reserved_300|>"
    for role in ("<|pad|>", *ROLES):
        assert tokenizer.encode(role) == [names.index(role)] and names.index(role) > 302
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
def test_cl100k_base_gives_the_ids_of_its_ranks(tmp_path):
    file = DATA / "tiktoken" / "cl100k_base.tiktoken"
    if not file.exists():
        pytest.skip(f"no copy of cl100k_base's rank file at {file}")
    ranks = read_ranks(file, CL100K.sha256)
    tokenizer = load_tokenizer("cl100k_base", tiktoken_file=str(file))
    assert len(tokenizer) == vocabulary_size(tokenizer) == 100_277
    for name, number in CL100K.special_tokens.items():
        assert tokenizer.convert_tokens_to_ids(name) == number
    texts = random_texts(200) + (DATA / "wikitext-2" / "wiki.test.raw").read_text()[:60_000].split("\n")
    expected = [[*slow_ids(text, ranks), 100_257] for text in texts]
    assert ids_of(encoder(tokenizer, tmp_path), texts) == expected
    try:
        import tiktoken
    except ImportError:
        return  # the twin above is what there is to compare with
    real = tiktoken.Encoding("x", pat_str=ORIGINAL, mergeable_ranks=ranks, special_tokens=CL100K.special_tokens)
    assert [[*real.encode_ordinary(text), 100_257] for text in texts] == expected


def test_a_rank_file_that_is_none_is_said(tmp_path):
    file = tmp_path / "a.tiktoken"
    with pytest.raises(UserError, match=r"cannot read .*a\.tiktoken: No such file"):
        read_ranks(file)
    for content, message in (("no ranks", "is not a rank file"), ("IQ== 0\n", "is not a whole rank file")):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_ranks(file)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in byte_ranks(260).items()]
    file.write_text("\n".join(lines))
    assert read_ranks(file) == byte_ranks(260)
    with pytest.raises(UserError, match="is not the rank file asked for"):
        load_tokenizer("cl100k_base", tiktoken_file=str(file))


def test_a_tokenizer_that_cannot_be_used_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no tokenizer could be loaded from .*nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
    bare = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare)
    assert vocabulary_size(tokenizer) == 8  # and not the 2 entries it has
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="has no eos_token"):
        load_tokenizer(str(tmp_path / "bare"))
