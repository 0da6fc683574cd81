"""The bench: what it computes from times, what it keeps, and that its pairs are pairs. No time is asserted."""

import dataclasses
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from periln.runkit.errors import UsageError
from periln.scripts.arguments.bench import parse
from periln.scripts.bench import command as bench
from periln.scripts.bench import trainer_pair

TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CPU = torch.device("cpu")


def tiny(name: str) -> bench.Case:
    case = bench.CASES[name]
    return dataclasses.replace(case, sizes=TINY, tokens=(1, 8), new_tokens=min(case.new_tokens, 2))


@pytest.fixture
def tiny_cases(monkeypatch):
    monkeypatch.setattr(bench, "CASES", {name: tiny(name) for name in bench.CASES})


@pytest.fixture(autouse=True)
def malloc_as_it_is(monkeypatch):
    """The tests' own process keeps its ways with memory."""
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: None)


def run(tmp_path, *more: str) -> dict:
    bench.main(parse(["--out", str(tmp_path), "--device", "cpu", *more]))
    return json.loads((tmp_path / "bench.json").read_text())


def test_the_ratio_is_that_of_the_medians_and_the_interval_holds_it():
    ours, theirs = np.array([1.0, 2.0, 3.0, 100.0, 2.0]), np.array([4.0, 4.0, 5.0, 4.0, 3.0])
    ratio, low, high = bench.interval_of_ratio(ours, theirs)
    assert ratio == 2.0
    assert low <= ratio <= high
    assert bench.interval_of_ratio(np.full(9, 2.0), np.full(9, 3.0)) == (1.5, 1.5, 1.5)


def test_a_slow_minute_that_falls_on_both_sides_does_not_widen_the_interval():
    slow = np.array([1.0] * 20 + [9.0] * 10)
    ratio, low, high = bench.interval_of_ratio(slow, 2 * slow)
    assert ratio == low == high == 2.0


def test_models_are_built_anew_every_few_pairs_and_no_warm_up_counts(tmp_path, monkeypatch):
    """Each call of a side takes as many seconds as calls were made before: times, order and what counts follow."""
    built, calls = [], []

    def build(case, device):
        built.append(len(calls))
        return "ours", "theirs"

    def seconds_of(side, device):
        calls.append(side)
        return float(len(calls))

    monkeypatch.setattr(bench, "CASES", {"norm-plain": dataclasses.replace(tiny("norm-plain"), build=build)})
    monkeypatch.setattr(bench, "seconds_of", seconds_of)
    result = run(tmp_path, "--cases", "norm-plain", "--pairs", "7", "--pairs-a-build", "3")["cases"]["norm-plain"]
    assert (result["pairs"], result["pairs_a_build"]) == (7, 3)
    warm_up = 2 * bench.WARM_UP
    assert built == [0, warm_up + 6, 2 * (warm_up + 6)] and len(calls) == 3 * warm_up + 14
    counted = [
        *range(warm_up, warm_up + 6),
        *range(2 * warm_up + 6, 2 * warm_up + 12),
        *range(len(calls) - 2, len(calls)),
    ]
    ours, theirs = ([i + 1 for i in counted if calls[i] == side] for side in ("ours", "theirs"))
    assert len(ours) == len(theirs) == 7
    assert result["median_seconds"] == [np.median(ours), np.median(theirs)]
    firsts = [calls[i] for i in counted[::2]]
    assert firsts == ["ours", "theirs"] * 3 + ["ours"]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"ratio": 1.1, "interval": [1.01, 1.2], "at_least": 1.0}, "met"),
        ({"ratio": 1.1, "interval": [0.9, 1.2], "at_least": 1.0}, "met?"),
        ({"ratio": 0.9, "interval": [0.8, 1.2], "at_least": 1.0}, "missed?"),
        ({"ratio": 0.9, "interval": [0.8, 0.99], "at_least": 1.0}, "missed"),
        ({"ratio": 0.3, "interval": [0.2, 0.35], "at_most": 0.4}, "met"),
        ({"ratio": 0.5, "interval": [0.41, 0.6], "at_most": 0.4}, "missed"),
        ({"ratio": 0.39, "interval": [0.3, 0.6], "at_most": 0.4}, "met?"),
        ({"ratio": 0.5, "interval": [0.4, 0.6], "at_least": None}, ""),
    ],
)
def test_a_verdict_says_whether_the_whole_interval_meets_the_target(result, expected):
    assert bench.verdict(result) == expected


def test_the_cases_are_those_of_the_table_in_the_readme():
    names = set(bench.CASES)
    for dtype in ("fp32", "bf16"):
        for how in ("eager", "compiled"):
            assert {f"train-pre-{dtype}-{how}", f"train-peri-{dtype}-{how}"} <= names
    assert {"peri-over-pre", "decode-1", "decode-16"} <= names
    assert bench.CASES["train-pre-fp32-eager"].target == 1.0
    assert bench.CASES["train-peri-bf16-compiled"].target == 0.97


@pytest.mark.parametrize("name", ["train-pre-bf16-eager", "train-peri-fp32-eager", "peri-over-pre"])
def test_both_sides_of_a_pair_are_the_same_function(name):
    case = tiny(name)
    ours, theirs = bench.models(case, CPU)
    ids = torch.arange(6)[None]
    a, b = (model(ids).logits.float() for model in (ours, theirs))
    if case.native:
        assert type(theirs).__name__.lower().startswith(case.native)
        assert (a - b).abs().max() < 1e-2
    else:
        assert (ours.config.norm_placement, theirs.config.norm_placement) == ("peri", "pre")
    assert a.abs().max() > 0
    own, others = ({p.data_ptr() for p in model.parameters()} for model in (ours, theirs))
    assert others <= own and (others == own) == bool(case.native)


@pytest.mark.parametrize("name", ["train-pre-fp32-eager", "peri-over-pre"])
def test_each_side_of_a_training_pair_moves_the_weights_that_both_have(name, monkeypatch):
    built = []
    models = bench.models
    monkeypatch.setattr(bench, "models", lambda *args: built.append(models(*args)) or built[-1])
    sides = bench.training_pair(dataclasses.replace(tiny(name), compiled=False), CPU)
    head = built[0][1].lm_head.weight
    for side in sides:
        before = head.detach().clone()
        side()
        assert not torch.equal(head, before) and head.grad is None


def test_a_pair_trains_and_a_pair_decodes():
    for name in ("train-pre-fp32-eager", "decode-16", "norm-plain"):
        for side in bench.CASES[name].build(tiny(name), CPU):
            assert bench.seconds_of(side, CPU) > 0


def test_what_was_measured_is_written_kept_and_measured_again_when_asked(tiny_cases, tmp_path, capsys):
    names = ("norm-plain", "train-pre-fp32-eager")
    first = run(tmp_path, "--cases", *names, "--pairs", "3")
    assert set(first["cases"]) == set(names)
    for result in first["cases"].values():
        assert result["pairs"] == 3 and result["interval"][0] <= result["ratio"] <= result["interval"][1]
    assert first["environment"]["threads"] == torch.get_num_threads()
    assert "| training step, pre, FP32, eager | llama |" in (tmp_path / "bench.md").read_text()
    capsys.readouterr()
    assert run(tmp_path, "--cases", *names, "--pairs", "3")["cases"] == first["cases"]
    assert capsys.readouterr().err.count("kept") == 2
    again = run(tmp_path, "--cases", "norm-plain", "--pairs", "3", "--again")["cases"]
    assert again["norm-plain"]["median_seconds"] != first["cases"]["norm-plain"]["median_seconds"]
    assert again["train-pre-fp32-eager"] == first["cases"]["train-pre-fp32-eager"]


def test_a_result_of_other_tokens_is_not_kept_for_what_is_asked(tiny_cases, tmp_path):
    name = "train-pre-fp32-eager"
    first = run(tmp_path, "--cases", name, "--pairs", "2")["cases"][name]
    other = run(tmp_path, "--cases", name, "--pairs", "2", "--tokens", "2", "4")["cases"][name]
    assert (first["batch"], first["sequence"], other["batch"], other["sequence"]) == (1, 8, 2, 4)
    assert "| 2 × 4 | 2 |" in (tmp_path / "bench.md").read_text()
    for more in ([], ["--tokens", "2", "4"]):
        assert run(tmp_path, "--cases", name, "--pairs", "2", *more)["cases"][name] == other


def test_tokens_are_those_of_training_steps_alone(tiny_cases, tmp_path):
    names = ("norm-plain", "decode-1")
    results = run(tmp_path, "--cases", *names, "--pairs", "2", "--tokens", "2", "4")["cases"]
    assert [(results[name]["batch"], results[name]["sequence"]) for name in names] == [(1, 8)] * 2
    assert "| 1 × 8 + 2 | 2 |" in (tmp_path / "bench.md").read_text()


def test_a_result_of_the_time_of_one_build_is_measured_again(tiny_cases, tmp_path):
    first = run(tmp_path, "--cases", "norm-plain", "--pairs", "2")
    del first["cases"]["norm-plain"]["pairs_a_build"]
    (tmp_path / "bench.json").write_text(json.dumps(first))
    assert "pairs_a_build" in run(tmp_path, "--cases", "norm-plain", "--pairs", "2")["cases"]["norm-plain"]


def test_a_mistake_is_said_before_anything_is_measured(tmp_path):
    with pytest.raises(UsageError, match="'decode-2' is not a case.*did you mean 'decode-1'"):
        run(tmp_path, "--cases", "decode-2")
    with pytest.raises(UsageError, match="--pairs 1 is too few"):
        run(tmp_path, "--pairs", "1")
    with pytest.raises(UsageError, match="--pairs-a-build 0"):
        run(tmp_path, "--pairs-a-build", "0")
    for batch, sequence in (("0", "8"), ("1", "1")):
        with pytest.raises(UsageError, match=f"--tokens {batch} {sequence}"):
            run(tmp_path, "--tokens", batch, sequence)
    (tmp_path / "bench.json").write_text(json.dumps({"environment": {"processor": "another"}, "cases": {"x": {}}}))
    with pytest.raises(UsageError, match="measured on another machine or version"):
        run(tmp_path, "--cases", "norm-plain")
    assert json.loads((tmp_path / "bench.json").read_text())["cases"] == {"x": {}}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["1m-fp16-eager-hf", "10m-fp16-eager-bare", "1m-fp32-eager-hf"])
def test_the_trainers_step_has_the_dtypes_of_its_rival_and_both_train_the_same_weights(case):
    name = f"trainer-{case}"
    ours, theirs = bench.trainer_pair(tiny(name), CPU)
    model = ours.trainer.model
    for side in (ours, theirs):
        before = model.lm_head.weight.detach().clone()
        assert 0 < bench.seconds_of(side, CPU) < 60
        assert not torch.equal(model.lm_head.weight, before)
    facts = ours.facts([2.0, 4.0])
    assert facts["linear_output_dtypes"] == [["float16" if "fp16" in name else "float32"]] * 2
    assert facts["tokens_per_second"] == [4.0, 2.0]
    assert facts["share_of_attainable"][0] == 2 * facts["share_of_attainable"][1] > 0


@pytest.mark.slow
def test_without_the_emulation_hfs_fp16_on_a_cpu_is_fp32(monkeypatch):
    """Why it is given: else two precisions would be compared."""
    monkeypatch.setattr(trainer_pair, "make_fp16_real", lambda accelerator: nullcontext())
    ours, _ = bench.trainer_pair(tiny("trainer-1m-fp16-eager-hf"), CPU)
    assert ours.facts([1.0, 1.0])["linear_output_dtypes"] == [["float16"], ["float32"]]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate", "quick_compiler")
def test_what_a_pair_tells_of_itself_is_in_the_result(tiny_cases, tmp_path):
    name = "trainer-1m-fp32-compiled-bare"
    result = run(tmp_path, "--cases", name, "--pairs", "2")["cases"][name]
    assert len(result["tokens_per_second"]) == 2 and result["linear_output_dtypes"] is None
    assert result["attainable_flops"] > 1e8


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate", "quick_compiler")
@pytest.mark.parametrize("name", ["recorder-fp32-eager", "recorder-fp16-eager-same", "recorder-fp32-compiled"])
def test_the_recorders_pair_differs_by_the_recorder_alone(name):
    first, second = bench.CASES[name].build(tiny(name), CPU)
    for side in (first, second, second, first):
        before = first.trainer.model.lm_head.weight.detach().clone()
        assert 0 < bench.seconds_of(side, CPU) < 60
        assert not torch.equal(second.trainer.model.lm_head.weight, before)
    assert [len(side.trainer.run.metrics()) for side in (first, second)] == [2, 2]
    recorded = not name.endswith("same")
    assert [bool(side.trainer.recorder) for side in (first, second)] == [recorded, False]
    seen = [bool(side.trainer.layer_stats.take().sums.any()) for side in (first, second)]
    assert seen == [recorded, False]
