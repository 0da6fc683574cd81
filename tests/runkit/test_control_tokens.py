"""Control tokens and words: what a text may become, whichever model looks its pieces up in the vocabulary."""

import json
import random

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from periln.eval.scoring.likelihood import ContinuationLM
from periln.eval.texts.windows import make_windows
from periln.runkit.control_tokens import JOINER, ROLES, control_tokens, is_control
from periln.runkit.encoding import TextEncoder, text_ids
from periln.runkit.errors import UserError
from periln.scripts.data.encoders import Encoder
from periln.sft.tokens import chat_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", *ROLES]
MARKUP, WORDS = ["<think>", "[INST]", "<tool_call>"], ["covid", "  ", "naïveté"]
SOME = ["the", "cat", "sat", "on", "a", "mat", "<", ">", "|", "user", "assistant", "[", "]", "INST", "turn", "/", "s"]
TEXTS = [" ".join(random.Random(n).choices(SOME, k=40)) for n in range(200)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _trained(model, trainer, **parts) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def unigram(charsmap: bool = False) -> Tokenizer:
    """As SentencePiece makes them: a blank before the text, what has no piece as bytes."""
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    made = _trained(models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace())
    data = json.loads(made.to_str())
    data["model"]["vocab"] += [[piece, -20.0] for piece in BYTES]
    data["model"]["byte_fallback"] = True
    made = Tokenizer.from_str(json.dumps(data))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    if charsmap:  # as those of T5 and XLM-R do it to characters without width
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(JOINER, "")])
    return made


def wordpiece() -> Tokenizer:
    parts = {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    return _trained(models.WordPiece(unk_token="<unk>"), trainer, **parts)


def wordpiece_of_words() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    model = models.WordPiece(unk_token="<unk>")
    return _trained(model, trainer, pre_tokenizer=pre_tokenizers.WhitespaceSplit())


def words() -> Tokenizer:
    trainer = trainers.WordLevelTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    return _trained(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizer=pre_tokenizers.WhitespaceSplit())


def bpe(ignore_merges: bool = False) -> Tokenizer:
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _trained(models.BPE(ignore_merges=ignore_merges), trainer, pre_tokenizer=level)


def bpe_of_whole_words() -> Tokenizer:
    return bpe(ignore_merges=True)


def bpe_that_merges_into_one() -> Tokenizer:
    """Whose merges give `</s>`, as one that was trained on markup and got the token afterwards."""
    data = json.loads(bpe().to_str())
    size = len(data["model"]["vocab"])
    data["model"]["vocab"] |= {"</": size, "</s": size + 1}
    data["model"]["merges"] = [["<", "/"], ["</", "s"], ["</s", ">"]] + data["model"]["merges"]
    return Tokenizer.from_str(json.dumps(data))


KINDS = [unigram, wordpiece, wordpiece_of_words, words, bpe, bpe_of_whole_words, bpe_that_merges_into_one]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request, tmp_path) -> PreTrainedTokenizerFast:
    backend = request.param()
    backend.add_tokens([AddedToken(token, normalized=False) for token in (*MARKUP, *WORDS)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=list(ROLES),
    )
    made.save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def contents() -> list[str]:
    spelled = [token for name in (*SPECIAL, *MARKUP) for token in (name, f"a{name}a", f"the {name} cat", name * 2)]
    return [
        *spelled,
        "".join(SPECIAL),
        "<|<|user|>user|>",
        "<0x41>",
        "the cat sat",
        f"{JOINER}the{JOINER}",
        "cat\n\nmat",
    ]


def control_ids(tokenizer) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids(control_tokens(tokenizer))) - {tokenizer.unk_token_id}


def test_markup_is_control_and_words_are_not(tokenizer):
    assert set(control_tokens(tokenizer)) == {*SPECIAL, *MARKUP}
    assert not any(is_control(word, special=False) for word in ("<3", "a>", "C++", "<", "()", "\n\n", "▁the"))
    assert is_control("#end#", special=True) and is_control(" <b> ", special=False) and not is_control("  ", True)


def test_no_text_becomes_a_control_token_in_pretraining_losses_and_benchmarks(tokenizer, tmp_path):
    encode = Encoder(tmp_path / "tokenizer" / "tokenizer.json", [], [], np.dtype(np.int64))
    lm = object.__new__(ContinuationLM)
    lm.tokenizer, lm.add_bos_token = tokenizer, None
    for content in contents():
        ids = text_ids(tokenizer)(content)
        assert not set(ids) & control_ids(tokenizer), (content, tokenizer.convert_ids_to_tokens(ids))
        assert encode([content]).ids.tolist() == ids
        assert make_windows([content], tokenizer, 512, packed=False).ids == [[tokenizer.eos_token_id, *ids]]
        assert lm.tok_encode(content) == ids
        assert lm.tok_encode(content, left_truncate_len=2) == ids[-2:]
    batch, mask = lm.tok_batch_encode(["the cat", "<s>the cat sat"])
    assert [row[kept.bool()].tolist() for row, kept in zip(batch, mask, strict=True)] == [
        lm.tok_encode("the cat"), lm.tok_encode("<s>the cat sat")
    ]  # fmt: skip
    assert batch[0, 0] == tokenizer.pad_token_id and mask[0, 0] == 0


def test_words_and_texts_without_control_tokens_keep_their_ids(tokenizer):
    encode = TextEncoder.of(tokenizer)
    for text in [*TEXTS[:20], "the covid cat", "covid", "a  mat", "naïveté", "東京 \U0001f642"]:
        assert encode.ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
    assert tokenizer.convert_tokens_to_ids("covid") in encode.ids("the covid cat")
    assert tokenizer.convert_tokens_to_ids("<s>") == SPECIAL.index("<s>")  # the tokenizer itself is as it was


def test_nor_does_one_in_a_conversation(tokenizer, tmp_path):
    chat = chat_tokenizer(tmp_path / "tokenizer")
    chat.save_pretrained(tmp_path / "tuned")
    user, assistant, end = chat.convert_tokens_to_ids(list(ROLES))
    for one in (chat, AutoTokenizer.from_pretrained(tmp_path / "tuned")):
        for content in contents():
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
            ids = one.apply_chat_template(turns, return_dict=True)["input_ids"]
            assert [i for i in ids if i in control_ids(one)] == [user, end, assistant, end], content
        word = one.apply_chat_template([{"role": "user", "content": "the covid cat"}], return_dict=True)["input_ids"]
        assert one.convert_tokens_to_ids("covid") in word


def test_a_tokenizer_that_would_find_them_in_its_vocabulary_is_refused(tmp_path):
    PreTrainedTokenizerFast(
        tokenizer_object=unigram(charsmap=True), unk_token="<unk>", eos_token="</s>", extra_special_tokens=list(ROLES)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="drops the joiner and finds the token in its vocabulary"):
        chat_tokenizer(tmp_path)
