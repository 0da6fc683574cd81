"""Held-out loss, samples, what is evaluated, and what is not computed twice."""

import json
import math
import shutil

import pytest
import torch

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.eval import evaluate
from periln.eval.scoring.generation import generate_samples
from periln.eval.scoring.harness import Benchmarks
from periln.eval.targets import find_target
from periln.eval.texts.documents import choose
from periln.eval.texts.samples import read_data
from periln.eval.texts.windows import heldout_loss, read_texts
from periln.runkit.checkpoints import write_checkpoint
from periln.runkit.errors import UsageError, UserError, run_command
from periln.runkit.folder import RunFolder, weights_hash
from periln.scripts.prepare_data import train_tokenizer

TEXTS = ["a first text about water and eggs", "short", "a third one, " * 30]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280, 256)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = PeriLlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return PeriLlamaForCausalLM(config).eval()


@pytest.fixture
def run_folder(tmp_path, model, tokenizer):
    run = RunFolder(tmp_path / "run")
    run.claim({"stage": "pretrain"})
    with write_checkpoint(run.checkpoint_path(3), model, tokenizer):
        pass
    run.set_status("completed", step=3)
    return run


def plainly(model, tokenizer, texts, context):
    """Token by token sums, one window at a time."""
    sums, counts = [], []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        total = 0.0
        for start in range(0, len(ids) - 1, context):
            window = torch.tensor([ids[start : start + context + 1]])
            with torch.no_grad():
                logs = model(window[:, :-1]).logits.double().log_softmax(-1)
            total -= logs[0].gather(1, window[0, 1:, None]).sum().item()
        sums.append(total)
        counts.append(len(ids) - 1)
    return sums, counts


@pytest.mark.parametrize("context", [16, 250])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_heldout_loss_is_the_plain_sum_over_all_tokens(model, tokenizer, context, batch_size):
    measured = heldout_loss(model, tokenizer, TEXTS, context, batch_size)
    sums, counts = plainly(model, tokenizer, TEXTS, context)
    loss, bits = (row["value"] for row in measured["results"])
    assert loss == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    assert bits == pytest.approx(sum(sums) / math.log(2) / sum(len(t.encode()) for t in TEXTS), rel=1e-6)
    assert measured["tokens"] == sum(counts)
    residuals = sum((s - loss * c) ** 2 for s, c in zip(sums, counts, strict=True))
    assert measured["results"][0]["stderr"] == pytest.approx(math.sqrt(3 / 2 * residuals) / sum(counts), rel=1e-4)


def test_heldout_texts_that_cannot_be_read_are_named(tmp_path):
    for content, message in (("", "holds no text"), ("{", "cannot read held-out texts"), ('{"x": 1}', "cannot read")):
        (tmp_path / "h.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            read_texts(tmp_path / "h.jsonl")


def test_texts_that_no_tokenizer_is_given_are_named_and_left_out_by_every_reader(tmp_path, capsys):
    lines = [json.dumps({"text": text}) for text in ("good", "half \ud83d", "a" * 30_000, "more")]
    for name in ("texts.jsonl", "marked.jsonl"):
        mark = b"\xef\xbb\xbf" if name.startswith("marked") else b""
        (tmp_path / name).write_bytes(mark + "\n".join(lines).encode())
        path = tmp_path / name
        for read in (read_texts, lambda path: list(read_data(str(path)))):
            assert [text.strip() for text in read(path)] == ["good", "more"]
            said = capsys.readouterr().out.splitlines()
            assert said[0].startswith(f"{path}, line 2 is left out: its text holds half of a surrogate pair")
            assert said[1].startswith(f"{path}, line 3 is left out: its text has 30,000 characters of one kind")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain")
    assert list(read_data(str(tmp_path / "a.txt"))) == ["plain"]
    texts = [json.loads(line)["text"] for line in lines]
    chosen = choose(texts, 4, 0, lambda number, text: number not in (2, 3))
    assert chosen == (["good", "more"], 4)
    assert choose(texts, 2, 1, lambda *_: True) == choose(texts, 2, 1)


def test_samples_are_seeded_and_do_not_repeat_the_prompt(model, tokenizer):
    first = generate_samples(model, tokenizer, ["a first"], chat=False, new_tokens=8)
    assert first == generate_samples(model, tokenizer, ["a first"], chat=False, new_tokens=8)
    assert first[0]["prompt"] == "a first"
    assert first[0]["text"]


def test_a_run_stands_for_its_newest_checkpoint(run_folder, model, tokenizer):
    with write_checkpoint(run_folder.checkpoint_path(12), model, tokenizer):
        pass
    target = find_target(run_folder.path)
    assert target.checkpoint.name == "step_00000012"
    assert target.evaluated()["path"] == "checkpoints/step_00000012"
    assert target.evaluated()["weights_sha256"] == weights_hash(target.checkpoint)


def test_a_diverged_run_stands_for_nothing(run_folder):
    run_folder.set_status("diverged", step=3)
    assert find_target(run_folder.path) is None
    assert find_target(run_folder.path / "sft") is None


def test_what_cannot_be_evaluated_is_named(run_folder, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_target(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is neither a run folder"):
        find_target(tmp_path)
    alone = shutil.copytree(run_folder.checkpoints()[-1], tmp_path / "alone")
    (alone / "manifest.json").unlink()
    (alone / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        find_target(alone)


def call(*args) -> int:
    return run_command(evaluate.main, evaluate.parse([*map(str, args)]))


@pytest.mark.slow
def test_a_result_that_is_there_is_computed_again_only_for_other_options_or_weights(run_folder, tmp_path, monkeypatch):
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    words = [run_folder.path, "--limit", 3, "--heldout", heldout, "--context", 32]
    assert call(*words) == 0
    files = sorted((run_folder.path / "eval").glob("*.json"))
    assert [f.name for f in files] == ["benchmarks-mini.json", "heldout.json", "sample.json"]
    times = [f.stat().st_mtime_ns for f in files]
    with monkeypatch.context() as patch:
        patch.setattr(Benchmarks, "load", lambda self: pytest.fail("the tasks were loaded for nothing"))
        assert call(*words) == 0
    assert [f.stat().st_mtime_ns for f in files] == times
    words[2] = 4
    assert call(*words) == 0
    changed = [f.stat().st_mtime_ns != t for f, t in zip(files, times, strict=True)]
    assert changed == [True, False, False]
    scores = json.loads(files[0].read_text())
    assert {r["n"] for r in scores["results"]} == {scores["limit"]} == {4}
    assert {(r["task"], r["metric"]) for r in scores["results"]} >= {
        ("mini_piqa", "acc_norm"),
        ("mini_winogrande", "acc"),
    }
    assert all(r["stderr"] is not None for r in scores["results"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "minni"], "suite 'minni' is unknown (did you mean 'mini'?)"),
        (["--limit", "0"], "limit must be at least 1 item a task, or a share of them below 1, not 0"),
        (["--batch-size", "0"], "batch size and context must be at least 1"),
    ],
)
def test_mistakes_are_usage_errors(run_folder, capsys, words, message):
    assert call(run_folder.path, *words) == 2
    assert message in capsys.readouterr().err


def test_no_target_is_a_usage_error():
    with pytest.raises(UsageError, match="name at least one"):
        evaluate.main(evaluate.parse([]))
