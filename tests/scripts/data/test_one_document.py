"""One document through every stage: what begins it is the same in all of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from tiny import train
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer

from periln.eval.scoring.generation import generate_samples
from periln.eval.scoring.harness import Benchmarks, Settings
from periln.eval.targets import find_target
from periln.eval.texts.samples import text_samples
from periln.eval.texts.windows import NO_DOCUMENT, make_windows
from periln.scripts.data.token_data import TokenData
from periln.scripts.data.tokenization import train_tokenizer
from periln.scripts.prepare_data import prepare
from periln.scripts.training.heldout import heldout_sequences
from periln.sft.tokens import chat_tokenizer

LINES = [f"the {n} of {n * 7 % 89} and <|user|> is text, number {n}. " * 12 for n in range(30)]
KINDS = {"adds nothing": ("$A", False), "adds <s>": ("<s> $A", True), "adds both ends": ("<s> $A </s>", True)}


class Stage:
    """A run of two steps on data of one tokenizer, and what must begin its documents."""

    def __init__(self, folder, single: str, begins: bool):
        made = train_tokenizer(LINES, 300, 77)
        made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
        self.bos, self.eos = made.convert_tokens_to_ids(["<s>", "</s>"])
        special = [("<s>", self.bos), ("</s>", self.eos)]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B", special_tokens=special
        )
        made.save_pretrained(folder / "tokenizer")
        (folder / "text").mkdir()
        for number, line in enumerate(LINES):
            (folder / "text" / f"{number:02d}.txt").write_text(line)
        self.plain = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.folder, self.begin = folder, [self.bos] if begins else []
        self.before = self.begin or [self.eos]
        prepare(str(folder / "text"), folder / "data", tokenizer=str(folder / "tokenizer"), heldout_share=0.2)
        self.data = TokenData(folder / "data")

    def ids(self, text: str) -> list[int]:
        return self.plain(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.fixture(scope="module", params=KINDS)
def stage(request, tmp_path_factory):
    made = Stage(tmp_path_factory.mktemp("stage"), *KINDS[request.param])
    made.run = train(made.folder, made.data.path, steps=2, checkpoint_every=2, heldout_every=2, heldout_sequences=2)
    made.checkpoint = made.run.checkpoints()[-1]
    made.target = find_target(made.run.path)
    made.model, made.tokenizer = made.target.load("cpu")
    return made


def test_the_shards_and_the_index_say_what_begins_a_document(stage):
    data = stage.data
    assert (data.begins_with, data.ends_with) == (stage.begin, [stage.eos])
    stream, start = data.read(0, len(data)).tolist(), 0
    heldout = set(data.heldout_documents())
    train_texts = [line.strip() for line in LINES if line.strip() not in heldout]
    for text, end in zip(train_texts, data.document_ends(0, len(data)).tolist(), strict=True):
        assert stream[start:end] == [*stage.begin, *stage.ids(text), stage.eos]
        start = end


def test_heldout_losses_read_it_so_in_training_and_after_it_packed_or_not(stage):
    texts = stage.data.heldout_documents()
    stream = [i for text in texts for i in (*stage.begin, *stage.ids(text), stage.eos)]
    inputs, _ = heldout_sequences(stage.data, stage.plain, 16, 3)
    assert inputs.flatten().tolist() == stream[:48]
    single = make_windows(texts, stage.tokenizer, 10_000, packed=False)
    assert single.ids == [[*stage.before, *stage.ids(text)] for text in texts]
    assert single.owners == [
        [NO_DOCUMENT] * (len(stage.before) - 1) + [n] * len(stage.ids(text)) for n, text in enumerate(texts)
    ]
    packed = make_windows(texts, stage.tokenizer, 10**6, packed=True)
    assert packed.ids == [([] if stage.begin else [stage.eos]) + stream[:-1]]
    scored = [i for i, owner in zip(packed.ids[0][1:], packed.owners[0], strict=True) if owner != NO_DOCUMENT]
    assert scored == [i for text in texts for i in stage.ids(text)]


def test_a_prompt_begins_like_a_document_and_does_not_end(stage, monkeypatch):
    for tokenizer in (stage.tokenizer, AutoTokenizer.from_pretrained(stage.checkpoint)):
        assert tokenizer("the 3 of")["input_ids"] == [*stage.begin, *stage.ids("the 3 of")]
        assert tokenizer.bos_token_id == stage.before[-1] and tokenizer.eos_token_id == stage.eos
        assert tokenizer.model_max_length == stage.model.config.max_position_embeddings
    config = AutoConfig.from_pretrained(stage.checkpoint)
    assert (config.bos_token_id, config.eos_token_id) == (stage.before[-1], stage.eos)
    assert stage.model.generation_config.bos_token_id == stage.before[-1]
    asked = []
    monkeypatch.setattr(stage.model, "generate", lambda ids, **_: asked.append(ids[0].tolist()) or ids)
    generate_samples(stage.model, stage.tokenizer, ["the 3 of"], chat=False)
    assert asked == [[*stage.begin, *stage.ids("the 3 of")]]


def test_lm_eval_scores_it_so(stage, monkeypatch):
    lm = Benchmarks(["mini_arc"], Settings(batch_size=2)).load_model(stage.target)
    asked = []

    def seen(requests, **_):
        asked.extend((context, continuation) for _, context, continuation in requests)
        return [(0.0, True)] * len(requests)

    monkeypatch.setattr(lm, "_loglikelihood_tokens", seen)
    pairs = [("the 3 of", " 21"), ("", "the 3 of")]
    lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("the 3 of",), 0)], disable_tqdm=True)
    whole, text = stage.ids("the 3 of 21"), stage.ids("the 3 of")
    assert asked[0] == ([*stage.begin, *text], whole[len(text) :])
    assert asked[1] == asked[2] == (stage.before, text)
    until = lm.tok_batch_encode(["the 3 of"])[0]
    assert until.tolist() == [[*stage.begin, *text]]


def test_the_bench_and_conversations_begin_so(stage, tmp_path):
    samples = text_samples(stage.tokenizer, iter(LINES), "lines", 3, 16, 0, 400)
    assert all(row[: len(stage.begin)].tolist() == stage.begin for row in samples.ids)
    assert stage.bos not in samples.ids[:, len(stage.begin) :] and samples.ids.shape == (3, 16)
    tokenizer = chat_tokenizer(stage.checkpoint)
    tokenizer.save_pretrained(tmp_path)  # as a server loads it
    turns = [{"role": "user", "content": "hello"}]
    user, end, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end_of_turn|>", "<|assistant|>"])
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = one.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == [*stage.begin, user, *stage.ids("hello"), end, assistant]


def test_data_of_the_older_form_keep_their_meaning(stage, tmp_path):
    older = tmp_path / "data"
    shutil.copytree(stage.data.path, older)
    shutil.rmtree(older / "tokenizer")
    shutil.copytree(stage.folder / "tokenizer", older / "tokenizer")
    index = json.loads((older / "index.json").read_text())
    for key in ("begins_with", "ends_with", "documents_cut"):
        del index[key]
    (older / "index.json").write_text(json.dumps(index))
    data = TokenData(older)
    assert data.begins_with == []
    inputs, _ = heldout_sequences(data, stage.plain, 8, 1)
    assert inputs[0].tolist() == stage.ids(data.heldout_documents()[0])[:8]
    run = train(tmp_path, older, steps=1, checkpoint_every=1)
    tokenizer = AutoTokenizer.from_pretrained(run.checkpoints()[-1])
    assert tokenizer("the 3 of")["input_ids"] == stage.ids("the 3 of")
    assert AutoConfig.from_pretrained(run.checkpoints()[-1]).bos_token_id == stage.eos


def test_the_first_token_is_trained_on_what_begins_a_document(stage):
    """The batches themselves hold it: nothing between the shards and the model takes it away."""
    windows = np.lib.stride_tricks.sliding_window_view(stage.data.read(0, len(stage.data)), 2)
    first = {stage.ids(line.strip())[0] for line in LINES}
    follows = {int(b) for a, b in windows if a == stage.before[-1]}
    assert follows and follows <= first
    assert torch.tensor(sorted(follows)).max() < stage.data.vocab_size
