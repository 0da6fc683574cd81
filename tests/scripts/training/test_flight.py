"""The flight recorder: what it writes, when, how often, and that it changes nothing."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import timeless, train, write_recipe
from torch._dynamo.utils import counters

from periln.runkit.folder import RunFolder, weights_hash
from periln.scripts.pretrain import load_recipe
from periln.scripts.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate")]

FP32 = {"mode": "fp32", "residual_dtype": None}
KEYS = ["step", "layer", "sublayer", "tensor", "stat"]


def trainer_of(tmp_path: Path, data: Path, **fields) -> Trainer:
    recipe, tokens = load_recipe(write_recipe(tmp_path, data, **fields))
    return Trainer(recipe, RunFolder(tmp_path / "run"), tokens)


def events(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in (run.path / "flight" / "events.jsonl").read_text().splitlines()]


def table(run: RunFolder, name: str) -> pd.Series:
    return pd.read_parquet(run.path / "flight" / name).set_index(KEYS).value


def files(run: RunFolder) -> list[str]:
    return sorted(path.name for path in (run.path / "flight").glob("*.parquet"))


def record(step: int, skip: bool = False, spike: bool = False) -> dict:
    kind = "backward" if skip else None
    return {"step": step, "found_inf": skip, "skip_kind": kind, "skip_module": None, "spike": spike, "grad_norm": 9.0}


@pytest.fixture
def flown(tmp_path, data):
    """Fly a recorder through steps with events, without training more than once."""

    def fly(happened: dict[int, dict], steps: int, saves: tuple[int, ...] = (), start: int = 0, **flight) -> RunFolder:
        trainer = trainer_of(tmp_path, data, flight={"steps": 4, "files": 32} | flight, steps=100)
        trainer._train_step(witness=False)
        seen, norms = trainer.layer_stats.take(), trainer.engine.gradient_norms
        trainer.recorder._steps.clear()
        trainer.recorder.resume(start)
        for step in range(start, steps):
            trainer.recorder.keep(step, seen, norms)
            trainer.recorder.note(record(step, **happened.get(step, {})))
            if step + 1 in saves:
                trainer.recorder.write()
        return trainer.run

    return fly


def test_a_skip_leaves_the_last_steps_up_to_itself(tmp_path, data):
    # Scales so high that the first three steps overflow in the backward pass.
    run = train(tmp_path, data, steps=8, precision={"initial_loss_scale": 2.0**34}, layer_stats_every=1)
    skipped = [r["step"] for r in run.metrics() if r["found_inf"]]
    assert len(skipped) >= 3
    seen = [e for e in events(run) if e["kind"] == "skip"]
    assert [e["step"] for e in seen] == skipped
    assert {e["skip_kind"] for e in seen} == {"probe"}
    first, last = seen[0]["file"], seen[-1]["file"]
    assert (first, last) != (last, first)
    rows = table(run, last)
    assert rows.index.unique("step").tolist() == list(range(skipped[-1] + 1))
    # The statistics are those of layers/, which are written every step here; the gradient's norm shows the overflow.
    for step in (skipped[0], skipped[-1]):
        written = pd.read_parquet(run.path / "layers" / f"step_{step:08d}.parquet").set_index(KEYS).value
        ours = rows.loc[[step]]
        assert set(ours.index.unique("tensor")) == {"stream", "residual_add", "branch", "gradient"}
        for key, value in ours.items():
            assert written[key] == pytest.approx(value, rel=1e-5, nan_ok=True), key
        gradients = ours[ours.index.get_level_values("tensor") == "gradient"]
        assert not np.isfinite(gradients).all()


def test_a_forward_overflow_shows_where_it_began(tmp_path, data):
    trainer = trainer_of(tmp_path, data)
    trainer._train_step(witness=False)
    trainer.step = 1
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.down_proj.weight.fill_(6e4)
        trainer.model.model.layers[1].mlp.up_proj.weight.fill_(1.0)
        trainer.model.model.layers[1].mlp.gate_proj.weight.fill_(1.0)
    assert trainer._train_step(witness=False)["skip_kind"] == "forward"
    (event,) = events(trainer.run)
    assert (event["step"], event["kind"], event["skip_kind"]) == (1, "skip", "forward")
    assert event["module"] == "model.layers.1.mlp.down_proj"
    rows = table(trainer.run, event["file"])
    peaks = rows.xs("max_abs", level="stat")
    broken = peaks[~np.isfinite(peaks)].loc[1]
    assert set(broken.index) == {(2, "mlp", t) for t in ("branch", "residual_add", "stream")}
    assert np.isfinite(peaks.loc[0]).all()


def test_a_divergence_leaves_the_run_s_last_steps(tmp_path, data):
    rules = {"loss_rise": 0.01, "window": 4}
    run = train(tmp_path, data, steps=40, optimizer={"learning_rate": 1.0}, flight={"steps": 3}, divergence=rules)
    assert run.status == "diverged"
    found, records = events(run), run.metrics()
    last = found[-1]
    assert (last["kind"], last["step"], last["reason"]) == ("diverged", len(records) - 1, run.summary["reason"])
    assert table(run, last["file"]).index.unique("step").tolist() == [r["step"] for r in records[-3:]]


def test_a_series_of_events_shares_files_and_no_row_is_written_twice(flown):
    run = flown({step: {"skip": True} for step in range(10, 23)}, steps=30)
    assert files(run) == [f"step_{step:08d}.parquet" for step in (10, 14, 18, 22)]
    assert [e["step"] for e in events(run)] == list(range(10, 23))
    steps = [step for name in files(run) for step in table(run, name).index.unique("step")]
    assert steps == list(range(7, 23))
    for event in events(run):
        assert event["step"] in table(run, event["file"]).index.unique("step")


def test_what_waits_is_written_with_the_next_checkpoint(flown):
    run = flown({10: {"skip": True}, 12: {"spike": True}}, steps=13, saves=(13,))
    assert files(run) == ["step_00000010.parquet", "step_00000012.parquet"]
    assert table(run, files(run)[1]).index.unique("step").tolist() == [9, 10, 11, 12]
    assert [e["kind"] for e in events(run)] == ["skip", "spike"]
    assert events(run)[1]["reason"] == "gradient norm 9, more than 6 sigma above the mean of the 128 steps before"


def test_no_more_files_than_the_recipe_allows(flown):
    run = flown({step: {"skip": True} for step in (5, 15, 25, 35)}, steps=40, files=2)
    assert files(run) == ["step_00000025.parquet", "step_00000035.parquet"]
    assert [e["file"] for e in events(run)] == [None, None, *files(run)]


def test_events_of_steps_that_are_done_again_are_dropped(flown):
    flown({5: {"skip": True}, 15: {"skip": True}}, steps=20)
    run = flown({15: {"skip": True}}, steps=20, start=14)
    assert [e["step"] for e in events(run)] == [5, 15]
    assert files(run) == ["step_00000005.parquet", "step_00000015.parquet"]
    assert table(run, files(run)[1]).index.unique("step").tolist() == [14, 15]  # the memory began anew


def test_with_and_without_the_recorder_a_run_is_the_same(tmp_path, data):
    with_it = train(tmp_path, data, steps=6)
    without = train(tmp_path, data, name="without", steps=6, flight={"steps": 0})
    assert timeless(with_it.path) == timeless(without.path)
    assert weights_hash(with_it.checkpoints()[-1]) == weights_hash(without.checkpoints()[-1])
    for file in (with_it.path / "layers").iterdir():
        assert file.read_bytes() == (without.path / "layers" / file.name).read_bytes()
    assert not (without.path / "flight").exists()


def test_a_layer_that_is_computed_again_in_the_backward_pass_counts_once(tmp_path, data):
    both = []
    for fields in ({}, {"activation_checkpointing": True}):
        trainer = trainer_of(tmp_path, data, precision=FP32, micro_batch_size=2, **fields)
        trainer._train_step(witness=False)
        seen = trainer.layer_stats.take()
        assert seen.entries == 4 * 32 * 32
        both.append(seen.sums)
    assert torch.equal(*both)
    assert both[0][:, 3].min() > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_tensor_that_is_seen_twice_is_not_recorded(tmp_path, data, compiled, monkeypatch, quick_compiler):
    trainer = trainer_of(tmp_path, data, precision=FP32, compile=compiled)
    layer = trainer.model.model.layers[1]

    def forward(hidden_states, *args, whole=layer.forward, **more):
        layer.mlp(hidden_states)
        return whole(hidden_states, *args, **more)

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(RuntimeError, match=r"the branch of layer 2 \(mlp\) 2 times in step 0"):
        trainer._train_step(witness=False)
    assert bool(counters["stats"]["unique_graphs"]) == compiled


def test_a_tensor_that_is_not_seen_is_not_recorded(tmp_path, data):
    trainer = trainer_of(tmp_path, data, precision=FP32)
    trainer.layer_stats._handles.pop(1).remove()
    with pytest.raises(RuntimeError, match=r"the branch of layer 1 \(attn\) 0 times in step 0"):
        trainer._train_step(witness=False)


@pytest.mark.parametrize(("placement", "hooks"), [("pre", 1 + 4 * 2), ("post", 1 + 6 * 2)])
def test_a_stream_without_a_norm_is_the_sum_and_is_read_once(tmp_path, data, placement, hooks):
    trainer = trainer_of(tmp_path, data, placement=placement)
    trainer._train_step(witness=False)
    stats = trainer.layer_stats
    assert len(stats._modules) == hooks
    sums = dict(zip(stats.places, stats.take().sums, strict=True))
    for layer in (1, 2):
        for sublayer in ("attn", "mlp"):
            same = torch.equal(sums[layer, sublayer, "stream"], sums[layer, sublayer, "residual_add"])
            assert same == (placement == "pre")
            assert not torch.equal(sums[layer, sublayer, "stream"], sums[layer, sublayer, "branch"])
