"""The report on a retrofit: its numbers computed again from the models, and what it refuses."""

import json
import shutil

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from small_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modeling_periln import PeriLlamaForCausalLM
from modeling_periln.convert import from_native
from periln.eval.arguments.retrofit import check, parse
from periln.eval.retrofit import picture
from periln.eval.retrofit.command import main
from periln.eval.scoring.harness import Benchmarks, Settings
from periln.eval.targets import find_target
from periln.eval.texts.samples import random_samples
from periln.runkit.errors import UsageError, UserError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama, and its tensors in a model with output norms of unit gain."""
    where = tmp_path_factory.mktemp("report")
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=200, max_position_embeddings=64, initializer_range=0.3, **SIZES)
    llama = LlamaForCausalLM(config)
    llama.save_pretrained(where / "llama")
    ours = from_native(llama)
    config = ours.config
    config.norm_placement, config.embedding_norm = "peri", None
    peri = PeriLlamaForCausalLM(config)
    peri.load_state_dict(ours.state_dict(), strict=False)
    peri.save_pretrained(where / "peri")
    return where


def run(folder, out, *words):
    args = parse([str(folder / "llama"), str(folder / "peri"), "--out", str(out), "--data", "random",
                  "--samples", "5", "--tokens", "24", "--batch-size", "2", *words])  # fmt: skip
    check(args)
    main(args)
    return json.loads((out / "report.json").read_text())


def test_the_numbers_are_those_of_the_models(tmp_path, folder, capsys):
    report = run(folder, tmp_path / "out", "--rows", "weights: INT4 per row,stream: FP16")
    ids = random_samples(200, 5, 24, 0).ids
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder / name)(ids).logits.double() for name in ("llama", "peri")
        ]
    losses = [F.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() for z in logits]
    p, q = (z.log_softmax(-1) for z in logits)
    source, peri = report["models"]
    assert [source["loss"], peri["loss"]] == pytest.approx(losses, rel=1e-5)
    assert source["kl"] is None
    assert peri["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert peri["top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert len(peri["stream_max_abs"]) == 4
    assert (source["placement"], peri["placement"]) == ("pre", "peri")
    assert [f["row"] for f in peri["formats"]] == ["weights: INT4 per row", "stream: FP16"]
    assert peri["formats"][1]["kl"] < 0.01 * peri["formats"][0]["kl"]
    shown = capsys.readouterr().out
    assert "peri: the loss is +" in shown or "peri: the loss is -" in shown
    frame = pd.read_csv(tmp_path / "out" / "report.csv")
    assert frame.loss.tolist() == pytest.approx(losses, rel=1e-4)
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_headroom_and_massive_activations_are_those_of_the_largest_value(tmp_path, folder):
    large = tmp_path / "models"
    shutil.copytree(folder, large)
    model = AutoModelForCausalLM.from_pretrained(large / "peri")
    with torch.no_grad():
        model.model.layers[1].mlp_output_norm.weight[7] = 5e4
    model.save_pretrained(large / "peri")
    report = run(large, tmp_path / "out", "--rows", "stream: FP16")
    peri = report["models"][1]
    assert peri["largest"]["headroom_bits"] < 0
    assert [m["channel"] for m in peri["massive_activations"]] == [7]
    assert peri["massive_activations"][0]["layer"] == 2
    assert peri["formats"][0]["rise_share"] is None
    assert "not finite" in (tmp_path / "out" / "report.md").read_text()


def test_the_figures_axis_holds_the_stream_and_fp16s_largest_number(monkeypatch):
    records = [{"name": name, "loss": 1.0, "kl": 0.1, "formats": []} for name in ("source", "peri")]
    figures = []
    monkeypatch.setattr(picture, "image_bytes", lambda figure: figures.append(figure) or b"")
    picture.draw(records, [[1.0, 100.0, 2e4], [1.0, 10.0, 30.0]])
    stream = figures[0].axes[1]
    assert stream.lines[-1].get_ydata()[0] == 65504
    assert stream.get_ylim()[0] < 1 and stream.get_ylim()[1] > 65504
    figures[0].canvas.draw()
    assert sum("10^{" in label.get_text() for label in stream.get_yticklabels()) >= 4


def test_the_tasks_are_lm_evals_for_each_model(tmp_path):
    tokenizer, models = make_tokenizer(), [tmp_path / name for name in ("one", "other")]
    for model, placement in zip(models, ("pre", "peri"), strict=True):
        make_model(tokenizer, placement).save_pretrained(model)
        tokenizer.save_pretrained(model)
    words = ["--out", str(tmp_path / "out"), "--data", "random", "--samples", "2", "--tokens", "16", "--rows", "none"]
    args = parse([*map(str, models), *words, "--tasks", "mini_piqa,mini_winogrande", "--limit", "4"])
    check(args)
    main(args)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for model, found in zip(models, report["models"], strict=True):
        alone = tmp_path / f"{model.name}.json"
        target, settings = find_target(model), Settings(limit=4, dtype="float32")
        plain = Benchmarks(["mini_piqa", "mini_winogrande"], settings).score(target, alone)["results"]
        assert [(r["task"], r["metric"]) for r in found["tasks"]] == [(r["task"], r["metric"]) for r in plain]
        values = [[row["value"] for row in rows] for rows in (found["tasks"], plain)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert report["models"][0]["tasks"] != report["models"][1]["tasks"]
    frame = pd.read_csv(tmp_path / "out" / "report.csv")
    bits = [r["value"] for r in report["models"][1]["tasks"] if r["metric"] == "gold_bits_per_byte"]
    assert len(bits) == 2 and frame["right answers, bits a byte"][1] == pytest.approx(sum(bits) / 2, rel=1e-4)
    assert frame["mini_piqa"].between(0, 1).all()
    assert "± " in (tmp_path / "out" / "report.md").read_text()


def test_a_model_that_cannot_be_scored_keeps_the_rest_of_the_report(tmp_path, monkeypatch):
    tokenizer, models = make_tokenizer(), [tmp_path / name for name in ("one", "other")]
    for model in models:
        make_model(tokenizer).save_pretrained(model)
        tokenizer.save_pretrained(model)

    def score(self, target, *rest):
        if target.name == "other":
            raise UserError("an item is too long")
        rows = [("mine", "exact_match", 0.5), ("mine", "gold_bits_per_byte", 1.5), ("piqa", "acc", 0.25)]
        return {"results": [{"task": t, "metric": m, "value": v, "stderr": None} for t, m, v in rows]}

    monkeypatch.setattr(Benchmarks, "score", score)
    words = ["--out", str(tmp_path / "out"), "--data", "random", "--samples", "2", "--tokens", "16", "--rows", "none"]
    args = parse([*map(str, models), *words, "--tasks", "mini_piqa"])
    check(args)
    main(args)
    frame = pd.read_csv(tmp_path / "out" / "report.csv")
    assert frame["mine, exact_match"][0] == 0.5 and frame["piqa"][0] == 0.25
    assert frame["right answers, bits a byte"][0] == 1.5
    assert frame.loss.notna().all() and frame["piqa"].isna()[1]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "other has no scores: an item is too long" in text and "25 %" in text


def test_what_it_refuses(tmp_path, folder):
    with pytest.raises(UsageError, match="--limit is of --tasks"):
        run(folder, tmp_path / "out", "--limit", "4")
    for limit in ("0", "-1", "1.5", "nan", "inf"):  # before anything is loaded
        words = [str(folder / "llama"), str(folder / "peri"), "--out", str(tmp_path / "out"), "--tasks", "mini_piqa"]
        with pytest.raises(UsageError, match="limit must be at least 1 item a task, or a share of them below 1"):
            check(parse([*words, f"--limit={limit}"]))
    with pytest.raises(UsageError, match="no tokenizer"):
        run(folder, tmp_path / "out", "--tasks", "mini_piqa")
    with pytest.raises(UsageError, match="--rows has no 'stream: FP17' .did you mean 'stream: FP16'"):
        run(folder, tmp_path / "out", "--rows", "stream: FP17")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("kept")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        run(folder, tmp_path / "there")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = LlamaConfig(vocab_size=201, max_position_embeddings=64, **SIZES)
    shutil.rmtree(other / "peri")
    LlamaForCausalLM(config).save_pretrained(other / "peri")
    with pytest.raises(UserError, match="has 201 tokens, and its source .* 200"):
        run(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
