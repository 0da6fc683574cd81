"""Which documents are chosen, what their loss is, how it is gone on with, and what becomes of it in a table."""

import gzip
import json
import math
from collections import Counter

import pytest
import torch
from small_models import make_model, make_run, make_tokenizer, serving, write_weights

from periln.eval import loss
from periln.eval.arguments.tables import parse as tables_parse
from periln.eval.tables import command as tables
from periln.eval.texts import documents
from periln.eval.texts.documents import KNOWN, Source, choose
from periln.eval.texts.windows import NO_DOCUMENT, make_windows
from periln.runkit.errors import run_command

DOCUMENTS = [f"document {i} about {'water and eggs ' * (i % 9 + 1)}" for i in range(60)]
CARD = """---
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
Test rows.
"""


def call(*words: object) -> int:
    return run_command(loss.main, loss.parse([*map(str, words), "--device", "cpu", "--threads", "1"]))


def record_of(run) -> dict:
    (file,) = (run.path / "eval").glob("loss-*.json")
    return json.loads(file.read_text())


def compressed(texts: list[str]) -> bytes:
    rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://x.y"} for text in texts]
    return gzip.compress("\n".join(map(json.dumps, rows)).encode())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """C4 as it lies on the Hub: compressed shards of JSON lines."""
    store = tmp_path_factory.mktemp("store")
    folder = store / "datasets" / "allenai" / "c4"
    (folder / "en").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for shard in range(2):
        rows = [*DOCUMENTS[30 * shard : 30 * shard + 30], " \n "]  # a blank one is none
        (folder / "en" / f"c4-validation.{shard:05d}-of-00002.json.gz").write_bytes(compressed(rows))
    (folder / "en" / "c4-train.00000-of-00001.json.gz").write_bytes(compressed(["of the other split"]))
    with serving(store, tmp_path_factory.mktemp("home")) as server:
        yield server


def test_the_choice_is_uniform_seeded_nested_and_in_order():
    texts = [str(i) for i in range(40)]
    first, of = choose(texts, 10, seed=3)
    assert of == 40
    assert first == choose(texts, 10, seed=3)[0]
    assert first != choose(texts, 10, seed=4)[0]
    assert sorted(first, key=int) == first
    assert set(choose(texts, 4, seed=3)[0]) < set(first)
    assert choose([*texts, "", " \n"], 50, seed=3) == (texts, 40)
    taken = Counter(text for seed in range(2000) for text in choose(texts, 10, seed)[0])
    assert all(abs(taken[text] - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75) for text in texts)


@pytest.mark.parametrize("packed", [False, True])
def test_every_token_of_a_document_is_scored_once_packed_or_not(packed):
    tokenizer = make_tokenizer()
    texts = ["water and eggs " * 9, "short", "more water"]
    windows = make_windows(texts, tokenizer, 8, packed)
    scored = [
        (owner, token)
        for ids, owners in zip(windows.ids, windows.owners, strict=True)
        for token, owner in zip(ids[1:], owners, strict=True)
        if owner != NO_DOCUMENT
    ]
    expected = [(i, t) for i, text in enumerate(texts) for t in tokenizer(text)["input_ids"]]
    assert scored == expected
    assert all(len(ids) == len(owners) + 1 <= 9 for ids, owners in zip(windows.ids, windows.owners, strict=True))
    starts = sum(ids[0] == tokenizer.bos_token_id for ids in windows.ids)
    assert starts == (1 if packed else 3) or packed
    read = {len(ids) for ids in windows.ids[:-1]}
    assert (read == {9}) == packed  # packed windows are full


@pytest.mark.slow
def test_c4_loss_is_the_mean_over_chosen_documents_streamed_from_the_hub(hub, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert call(run.path, "--documents", 20, "--seed", 5, "--context", 64, "--debug") == 0
    record = record_of(run)
    chosen, _ = choose(DOCUMENTS, 20, seed=5)
    assert (record["kind"], record["dataset"], record["documents"]) == ("c4", "allenai/c4 en validation", 20)
    assert (record["of_documents"], record["packed"], record["context"]) == (60, False, 64)
    assert len(record["dataset_revision"]) == 40
    tokenizer = make_tokenizer()
    model, nats, tokens = make_model(tokenizer, seed=1), 0.0, 0
    for text in chosen:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        for start in range(0, ids.shape[1] - 1, 64):
            window = ids[:, start : start + 65]
            with torch.no_grad():
                logs = model(window[:, :-1]).logits.double().log_softmax(-1)
            nats -= logs[0].gather(1, window[0, 1:, None]).sum().item()
        tokens += ids.shape[1] - 1
    by_name = {row["metric"]: row for row in record["results"]}
    assert record["tokens"] == tokens
    assert by_name["loss"]["value"] == pytest.approx(nats / tokens, rel=1e-5)
    size = sum(len(text.encode()) for text in chosen)
    assert by_name["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert 0 < by_name["loss"]["stderr"] < 1
    assert 0 < by_name["bits_per_byte"]["stderr"] < 1
    capsys.readouterr()
    assert call(run.path, "--documents", 20, "--seed", 5, "--context", 64) == 0  # is there: only shown
    assert f"{by_name['loss']['value']:.4f} ± " in capsys.readouterr().out
    # ... and Table 2 takes it.
    assert run_command(tables.main, tables_parse([str(run.path), "--format", "csv"])) == 0
    head, row = (line.split(",") for line in capsys.readouterr().out.splitlines()[-2:])
    cells = dict(zip(head, row, strict=True))
    assert float(cells["c4_loss"]) == pytest.approx(by_name["loss"]["value"], abs=0.01)
    assert float(cells["c4_bits_per_byte"]) == pytest.approx(by_name["bits_per_byte"]["value"], abs=0.01)


def test_the_note_names_every_window_and_count_of_tokens():
    one = {"dataset": "d", "documents": 5, "of_documents": 9, "seed": 0, "packed": False, "dtype": "float32"}
    one |= {"results": [{"value": 1.0, "stderr": 0.1}, {"value": 2.0, "stderr": None}], "tokens": 1200, "context": 64}
    (note,) = loss.table([("a", one), ("b", one | {"context": 128}), ("c", one | {"tokens": 900})]).notes
    assert "1,200 and 900 tokens, each document by itself, windows of 64 and 128 tokens, float32;" in note


def test_a_window_longer_than_the_positions_is_refused_before_a_document_is_read(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(documents, "stream", lambda *a: pytest.fail("documents were read"))
    assert call(run.path, "--context", 513) == 2
    assert "--context 513 is more than the 512 positions of run" in capsys.readouterr().err


def test_a_loss_that_is_not_a_number_is_said_at_the_first_batch_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    run, sample = make_run(tmp_path / "run"), tmp_path / "sample.jsonl"
    model = make_model(make_tokenizer())
    model.model.layers[0].mlp.down_proj.weight.data[3, 3] = torch.nan
    write_weights(run, model)
    source = documents.named("no/where", None, None, None, None)
    documents.write_sample(sample, documents.Sample(source, 0, DOCUMENTS[:4], 60), 4)
    monkeypatch.setattr(loss, "SAVE_EVERY", 1)
    words = ("--dataset", "no/where", "--documents", 4, "--sample", sample, "--batch-size", 1)
    assert call(run.path, *words) == 1
    assert "run: the loss is not finite in torch.float32" in capsys.readouterr().err
    assert not (run.path / "eval").exists()


@pytest.mark.slow
def test_a_loss_that_was_stopped_goes_on_to_the_same_number(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "SAVE_EVERY", 2)
    whole, cut = make_run(tmp_path / "whole"), make_run(tmp_path / "cut")
    words = ("--documents", 20, "--context", 16, "--batch-size", 4, "--sample", tmp_path / "sample.jsonl")
    assert call(whole.path, *words) == 0
    real, calls = loss.write_json, []

    def killed(path, value):
        real(path, value)
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loss, "write_json", killed)
    monkeypatch.setattr(documents, "stream", lambda *a: pytest.fail("the sample was kept, and is not streamed again"))
    assert call(cut.path, *words) == 130
    assert not list((cut.path / "eval").glob("*.json"))
    (partial,) = (cut.path / "eval").glob(".*.partial")
    assert json.loads(partial.read_text())["batches"] == 6
    monkeypatch.setattr(loss, "write_json", real)
    assert call(cut.path, *words) == 0
    assert record_of(cut)["results"] == record_of(whole)["results"]
    assert not list((cut.path / "eval").glob(".*.partial"))


def test_only_the_english_validation_split_is_called_c4():
    assert KNOWN["c4"].is_c4
    assert documents.named("allenai/c4", None, None, None, "abc").is_c4
    assert documents.named("allenai/c4", None, None, None, "abc").task == "c4"
    train = documents.named("c4", None, "train", None, None)
    assert not train.is_c4 and train.task == "allenai/c4 en train"
    assert documents.named("wikitext-pages", None, None, None, None).task == "wikitext-pages"
    assert documents.named("x/y", None, None, None, None) == Source("x/y", None, "validation", "text")


@pytest.mark.slow
def test_what_cannot_be_measured_is_one_sentence(hub, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    sample = tmp_path / "sample.jsonl"
    assert call(run.path, "--documents", 3, "--sample", sample) == 0
    for words, code, message in (
        (("--documents", 0), 2, "--documents must be at least 1, not 0"),
        (("--documents", 2, "--column", "txt"), 2, "has no column 'txt' (did you mean 'text'?)"),
        (("--dataset", "no/where"), 1, "no/where validation: the Hub does not have it"),
        (("--split", "tset"), 1, "allenai/c4 en tset: "),
        (("--documents", 4, "--sample", sample), 1, "holds another sample (asked 3, not 4)"),
        (("--batch-size", 0), 2, "--batch-size must be at least 1, or auto, not 0"),
    ):
        assert call(run.path, *words) == code, words
        assert message in capsys.readouterr().err
