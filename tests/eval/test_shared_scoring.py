"""A question's answers with their common beginning computed once: the same log-likelihoods, fewer tokens."""

import json
import math
import random

import pytest
import torch
from lm_eval.api.instance import Instance
from small_models import make_model, make_run, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from periln.eval import bench, benchmarks
from periln.eval.scoring import gold, shared
from periln.eval.scoring.harness import Benchmarks, Settings
from periln.eval.scoring.likelihood import ContinuationLM
from periln.eval.scoring.shared import SharedPrefixLM, rows_of
from periln.eval.targets import find_target
from periln.runkit.errors import run_command

WORDS = [
    "water",
    "eggs",
    "a",
    "text",
    "third",
    "first",
    "short",
    "one",
    "about",
    "and",
    "boil",
    "question",
    "answer",
    "long",
]


def asked(seed: int, answers: int = 4, documents: int = 9) -> list[Instance]:
    """Questions with answers of 0 to 6 words behind them; every third has its answers in the context (Winogrande)."""
    generator, found = random.Random(seed), []

    def some(least: int, most: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(least, most)))

    for document in range(documents):
        context = f"Question: {some(3, 25)}"
        for i in range(answers):
            words = (f"{context} {some(1, 4)}", " it was") if document % 3 == 0 else (context, f" {some(1, 6)}")
            found.append(Instance("loglikelihood", {}, words, i, ("task", document, 1)))
    return found


def both(model, batch_size: int = 3) -> tuple[ContinuationLM, SharedPrefixLM]:
    options = {"tokenizer": make_tokenizer(), "batch_size": batch_size, "device": "cpu"}
    return ContinuationLM(pretrained=model, **options), SharedPrefixLM(pretrained=model, **options)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(make_tokenizer()), max_position_embeddings=512, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("make", [lambda: make_model(make_tokenizer()), llama], ids=["peri_llama", "llama"])
def test_log_likelihoods_are_those_of_the_plain_way(make, batch_size, attention):
    model = make()
    model.set_attn_implementation(attention)
    plain, ours = both(model, batch_size)
    requests = asked(batch_size)
    expected, found = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (plain, ours))
    assert ours.why_not is None
    assert [x[0] for x in found] == pytest.approx([x[0] for x in expected], abs=shared.TOLERANCE)
    assert [x[1] for x in found] == [x[1] for x in expected]
    assert max(abs(a[0] - b[0]) for a, b in zip(expected, found, strict=True)) < 1e-4


def test_the_model_reads_the_shared_tokens_once(monkeypatch):
    requests = [([1, 2, 3, 4, 5, 6, 7, 8, 10 + i], 1) for i in range(4)]  # what the model reads, tokens that are scored
    (row,) = rows_of(requests)
    assert (row.shared, row.own, row.members) == (8, 4, [0, 1, 2, 3])
    packed = shared.pack([[row]], torch.float32, torch.device("cpu"))
    assert packed.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13]]
    assert packed.positions[0, 8:].tolist() == [8, 8, 8, 8]
    sees = packed.mask[0, 0] == 0
    assert sees[9].tolist() == [True] * 8 + [False, True, False, False]


@pytest.mark.parametrize("reverse", [False, True])
def test_the_same_tokens_cut_at_different_places_are_scored_apart(reverse):
    """The plain way: HFLM reads the logits of one request at the places of the other."""
    model, ids = llama(), [5, 9, 7, 11, 6, 8]
    cuts = [(ids[:4], ids[4:]), (ids[:5], [12]), (ids[:2], [*ids[2:5], 13]), (ids[:5], [14]), ([3, 4], [5])]
    requests = [(("", ""), context, answer) for context, answer in (cuts[::-1] if reverse else cuts)]
    plain, _ = both(model)
    found = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, answer), (value, greedy) in zip(requests, found, strict=True):
        logs = model(torch.tensor([[*context, *answer]])).logits.log_softmax(-1)[0, len(context) - 1 : -1]
        assert value == pytest.approx(sum(logs[i, t].item() for i, t in enumerate(answer)), abs=1e-4)
        assert greedy == (logs.argmax(-1).tolist() == answer)


def test_two_questions_in_a_row_see_nothing_of_each_other():
    questions = rows_of(
        [([1, 2, 3, 4, 5, 10 + i], 1) for i in range(2)] + [([6, 7, 8, 9, 9, 9, 20 + i], 2) for i in range(3)]
    )
    assert [(q.shared, q.own) for q in questions] == [(5, 2), (6, 3)]
    (bin,) = shared.bins_of(questions)
    packed = shared.pack([bin], torch.float32, torch.device("cpu"))
    # The one with more to score comes first: two contexts without their last tokens, then each one's last and answers.
    assert packed.ids.tolist() == [[6, 7, 8, 9, 9, 1, 2, 3, 4, 9, 20, 21, 22, 5, 10, 11]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 6, 6, 6, 4, 5, 5]]
    assert packed.kept == 7 and packed.places == [[[0, 1, 2, 3], [4, 5, 6]]]
    sees = (packed.mask[0, 0] == 0).int()
    assert sees[11].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0]  # 21: its context and itself
    assert sees[7].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]  # a context's token: what is before it


def test_rows_of_a_batch_are_about_as_long():
    generator = random.Random(7)
    questions = [
        rows_of([([n] * generator.randint(20, 60) + [i] * generator.randint(5, 40), 5) for i in range(4)])[0]
        for n in range(16)
    ]
    bins = shared.bins_of(questions)
    assert sorted(map(id, questions)) == sorted(id(question) for bin in bins for question in bin)
    kept = [sum(1 + question.own for question in bin) for bin in bins]
    assert len(bins) > 1 and max(kept) < 1.2 * min(kept)
    long = rows_of([([0] * 700 + [i] * 50, 50) for i in range(2)])
    assert [len(bin) for bin in shared.bins_of(long + questions[:2])] == [1, 2]


def test_requests_that_share_nothing_stay_apart_and_none_is_lost():
    requests = [([number, *range(20)], 2) for number in range(5)] + [([4, *range(18), 77], 3)]
    rows = rows_of(requests)
    assert [row.members for row in rows] == [[0], [1], [2], [3], [4, 5]]
    assert rows[-1].shared == 18  # the logits of the last shared token score the first token of request 5's answer
    assert all(row.width <= shared.WIDEST for row in rows_of([([0] * 400 + [i] * 300, 1) for i in range(6)]))


def test_a_context_longer_than_the_positions_is_cut_as_the_harness_cuts_it():
    plain, ours = both(make_model(make_tokenizer()))
    long = " ".join(WORDS * 60)
    requests = [Instance("loglikelihood", {}, (long, f" {word}"), i, ("task", 0, 1)) for i, word in enumerate(WORDS)]
    requests += asked(3, documents=2)
    expected, found = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (plain, ours))
    assert [x[0] for x in found] == pytest.approx([x[0] for x in expected], abs=shared.TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mistral", "some of its layers attend to a window"),
        ("half", "only FP32 agrees"),
        ("mamba", "not all full attention: linear_attention"),
    ],
)
def test_a_model_that_cannot_share_is_scored_the_plain_way_and_says_why(kind, reason):
    size = {"vocab_size": len(make_tokenizer()), "hidden_size": 32, "num_hidden_layers": 1}
    if kind == "half":
        model = llama().bfloat16()
    elif kind == "mamba":
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **size)).eval()
    else:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, sliding_window=8, **size, **heads)).eval()
    plain, ours = both(model)
    requests = asked(5, documents=3)
    assert ours.loglikelihood(requests, disable_tqdm=True) == plain.loglikelihood(requests, disable_tqdm=True)
    assert reason in ours.why_not


def test_a_model_that_does_not_obey_the_mask_is_found_out(monkeypatch):
    """Everything declares that it takes masks; the check by numbers is what counts."""
    plain, ours = both(llama())
    real = shared.pack
    monkeypatch.setattr(shared, "pack", lambda *a: shared.Packed(**{**vars(real(*a)), "mask": 0 * real(*a).mask}))
    requests = asked(6)
    assert ours.loglikelihood(requests, disable_tqdm=True) == plain.loglikelihood(requests, disable_tqdm=True)
    assert "log-likelihoods differ from the plain way by" in ours.why_not


def test_weights_that_are_not_numbers_are_refused():
    _, ours = both(llama())
    ours.model.lm_head.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError):
        ours.loglikelihood(asked(7), disable_tqdm=True)


def test_a_record_says_how_it_was_scored_and_a_plain_one_is_not_a_substitute(tmp_path):
    run = make_run(tmp_path / "run")
    words = [str(run.path), "--tasks", "mini_piqa,mini_winogrande", "--limit", "6", "--device", "cpu"]
    assert run_command(benchmarks.main, benchmarks.parse(words)) == 0
    assert run_command(benchmarks.main, benchmarks.parse([*words, "--scoring", "shared"])) == 0
    found = {r["scoring"]: r for r in (json.loads(f.read_text()) for f in (run.path / "eval").glob("bench*.json"))}
    assert set(found) == {"plain", "shared"}
    for one, other in zip(found["plain"]["results"], found["shared"]["results"], strict=True):
        assert (one["task"], one["metric"]) == (other["task"], other["metric"])
        assert one["value"] == pytest.approx(other["value"], abs=1e-3)


def test_bits_a_byte_are_those_of_the_right_answer(tmp_path):
    run = make_run(tmp_path / "run")
    names = ("mini_arc_easy", "mini_winogrande")
    benches = Benchmarks(names, Settings(limit=5))
    target = find_target(run.path)
    lm = benches.load_model(target)
    for name in names:
        answer = benches.run(name, lm, target, log_samples=True)
        (task,) = benches.loaded(name)
        by_hand = []
        for doc in list(task.eval_docs)[:5]:
            if name == "mini_winogrande":  # the answers are in the context; what is scored follows
                before, after = doc["sentence"].split("_")
                words = (before + doc[f"option{doc['answer']}"], " " + after.strip())
            else:
                right = doc["choices"]["label"].index(doc["answerKey"])
                words = (f"Question: {doc['question']}\nAnswer:", " " + doc["choices"]["text"][right])
            ((value, _),) = lm.loglikelihood([Instance("loglikelihood", {}, words, 0)], disable_tqdm=True)
            by_hand.append(-value / math.log(2) / len(words[1].encode()))
        (row,) = answer["gold"]
        assert (row["task"], row["metric"], row["n"]) == (name, gold.METRIC, 5)
        assert row["value"] == pytest.approx(sum(by_hand) / 5, rel=1e-5)
        assert row["stderr"] == pytest.approx(torch.tensor(by_hand).std().item() / math.sqrt(5), rel=1e-4)


def test_the_bench_measures_the_shared_way_against_the_harness(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    words = [str(run.path), "--tasks", "mini_piqa", "--limit", "3", "--pairs", "1", "--device", "cpu"]
    assert run_command(bench.main, bench.parse([*words, "--scoring", "shared"])) == 0
    assert "log-likelihoods within" in capsys.readouterr().out


def test_an_answer_ranked_otherwise_is_found():
    requests = asked(8, answers=2, documents=2)
    theirs = [(-1.0, False), (-2.0, False), (-3.0, False), (-3.0001, False)]
    ours = [(-2.0, False), (-1.0, False), (-3.0001, False), (-3.0, False)]
    assert bench.ranked_otherwise(requests, ours, theirs, gap=2e-4) == [("task", 0)]
