"""Model cards: the metadata as the Hub's client reads it, and numbers that come from the run folder or are missing."""

import json
import re
import shutil
from pathlib import Path

import hub_run
import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard

from periln.model_cards import render as render_command
from periln.model_cards.cards import CardOptions, render_card
from periln.model_cards.placement import diagram, plan_of
from periln.model_cards.subject import Subject, find_subject
from periln.runkit.errors import UserError, run_command
from periln.runkit.folder import RunFolder

FIVE = {"ARC-Easy": 0.30, "HellaSwag": 0.35, "PIQA": 0.40, "SIQA": 0.45, "Winogrande": 0.50}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Three seeds of one recipe, the last of which diverged; and another placement."""
    root = tmp_path_factory.mktemp("runs")
    for seed, status in ((1, "completed"), (2, "completed"), (3, "diverged")):
        hub_run.write_run(root, seed=seed, status=status)
    hub_run.write_run(root, "pre")
    return root


@pytest.fixture(scope="module")
def card(runs) -> ModelCard:
    subject = find_subject(runs / "peri_seed1")
    options = CardOptions("acme/tiny", "mit", ("en", "ko"), figures=("headroom.png",))
    return ModelCard(render_card(subject, options))


def section(card: ModelCard, name: str) -> str:
    return card.text.split(f"# {name}\n", 1)[1].split("\n## ", 1)[0]


# The metadata


def test_the_client_reads_back_what_the_hub_wants(card):
    data = card.data
    assert (data.license, data.language, data.library_name) == ("mit", ["en", "ko"], "transformers")
    assert (data.pipeline_tag, data.datasets, data.model_name) == ("text-generation", ["acme/text"], "tiny")
    assert data.tags == ["peri-llama", "peri", "arxiv:2502.02732"]


def test_named_datasets_stand_in_place_of_the_recorded_one(runs):
    text = render_card(find_subject(runs / "peri_seed1"), CardOptions(datasets=("acme/a", "acme/b")))
    assert ModelCard(text).data.datasets == ["acme/a", "acme/b"]


def test_the_model_index_holds_the_five_benchmarks_as_they_were_measured(card):
    results = {r.dataset_name: r for r in card.data.eval_results}
    assert {name: r.metric_value for name, r in results.items()} == FIVE
    arc = results["ARC-Easy"]
    assert (arc.task_type, arc.dataset_type, arc.dataset_config) == ("text-generation", "allenai/ai2_arc", "ARC-Easy")
    assert (arc.dataset_split, arc.metric_type, arc.source_name) == ("test", "acc", "lm-eval 0.4.13")
    assert arc.dataset_args == {"num_few_shot": 0, "items": 1000}
    assert "model-index" in card.data.to_dict()


def test_the_mini_sets_stand_in_the_text_and_not_in_the_metadata(tmp_path):
    run = hub_run.write_run(tmp_path)
    (run / "eval" / "benchmarks-hub.json").unlink()
    hub_run.write_scores(run, tasks=tuple(f"mini_{t}" for t in hub_run.HUB_TASKS), file="mini")
    card = ModelCard(render_card(find_subject(run)))
    assert card.data.eval_results is None
    assert "mini_arc_easy | acc | 30.00" in card.text and "cannot be compared with any others" in card.text
    minis = ",".join(f"mini_{t}" for t in hub_run.HUB_TASKS)
    assert f"periln benchmarks ORG/NAME --tasks {minis} --trust-remote-code" in card.text
    assert "lm_eval run" not in card.text  # whose tasks this card has no scores of


def test_how_to_evaluate_names_the_tasks_that_the_scores_are_of(tmp_path):
    run = hub_run.write_run(tmp_path)
    (run / "eval" / "benchmarks-hub.json").unlink()
    hub_run.write_scores(run, tasks=("piqa", "winogrande"), file="two")
    text = render_card(find_subject(run))
    assert "--tasks piqa,winogrande --batch_size 16" in text and "periln benchmarks" not in text


def test_of_two_records_of_a_task_the_one_with_more_items_counts(tmp_path):
    run = hub_run.write_run(tmp_path)
    record = json.loads((run / "eval" / "benchmarks-hub.json").read_text())
    record["results"] = [{"task": "piqa", "metric": "acc", "value": 0.9, "stderr": 0.1, "n": 10}]
    (run / "eval" / "benchmarks-limited.json").write_text(json.dumps(record | {"limit": 10}))
    card = ModelCard(render_card(find_subject(run)))
    assert {r.dataset_name: r.metric_value for r in card.data.eval_results} == FIVE
    assert "| piqa | acc | 90.00 ± 10.00 % | 10 (limit 10) |" in card.text


def test_a_card_has_no_empty_sections(tmp_path, card):
    heads = ("Placement of the norms", "Results", "Seeds", "FP16", "Figures", "Limitations", "How to evaluate")
    assert all(f"# {head}\n" in card.text for head in heads)
    bare = ModelCard(render_card(Subject(hub_run.write_run(tmp_path) / "checkpoints" / "step_00000008", None)))
    assert "# Seeds" not in bare.text and "# Figures" not in bare.text
    assert section(bare, "FP16").strip().startswith("Headroom, certificate and number formats: not measured (")
    for part in re.split(r"^#+ .*$", bare.text, flags=re.MULTILINE)[1:]:
        assert part.strip() not in ("", "Not recorded.", "None were drawn.")


# The text


def test_numbers_are_those_of_the_run_folder(card):
    assert "14,304 parameters, 512 tokens seen" in card.text
    assert "| skipped steps | 1 of 8 (1 probe) |" in card.text
    assert "| time in recorded steps | 12 s |" in card.text
    assert "| tokens a second (median) | 1,000 |" in card.text
    assert "| training loss (mean of the last tenth) | 2.3 |" in card.text
    assert "| heldout | loss | 2.2500 | 50 |" in card.text
    assert "| arc_easy | acc | 30.00 ± 1.00 % | 1,000 | 0 | float32 | benchmarks-hub.json |" in card.text
    assert "| data | hf:acme/text |" in card.text and "| tokenizer | cl100k_base |" in card.text
    assert "| device | Some CPU @ 2.0 GHz |" in card.text
    assert "![headroom.png](figures/headroom.png)" in card.text


def test_headroom_and_certificate_are_the_records_own(card):
    fp16 = section(card, "FP16")
    assert "12.0 bits (largest value 16: stream, layer 1 mlp, step 0)" in fp16  # log2(65504 / 16)
    assert "13.0 bits (largest value 8: residual_add, layer 2 mlp, step 8)" in fp16
    assert "1 of 2 tensors are bounded by the weights alone, 1 of them within 65,504; the largest bound is 100" in fp16
    assert "- The variance grows linearly." in fp16


def test_seeds_of_the_same_recipe_stand_side_by_side_with_those_that_diverged(card):
    seeds = section(card, "Seeds")
    assert re.findall(r"^\| (\d) \| (\w+)", seeds, re.M) == [("1", "completed"), ("2", "completed"), ("3", "diverged")]
    assert "Diverged: 1 of 3." in seeds
    assert "the loss was not finite" in seeds


def test_a_card_of_an_earlier_checkpoint_has_its_own_tokens_and_no_later_scores(runs):
    card = ModelCard(render_card(find_subject(runs / "peri_seed1", step=4)))
    assert "256 tokens seen" in card.text and "Scores: not measured." in card.text
    assert card.data.eval_results is None


def test_a_diverged_run_says_so_first(runs):
    text = render_card(find_subject(runs / "peri_seed3"))
    assert text.index("**This run diverged.**") < text.index("## Placement")


def test_each_checkpoint_has_the_benchs_sentences_on_itself(tmp_path):
    run = hub_run.write_run(tmp_path)
    entries = [{"step": 4, "verdict": ["The largest |x| is 5."]}, {"step": 8, "verdict": ["The largest |x| is 8."]}]
    whole = {"checkpoints": entries, "verdict": ["It grows.", "The largest |x| is 8."]}
    hub_run.write_json(run / "eval" / "stability" / "stability.json", whole)
    first, last = (ModelCard(render_card(find_subject(run, step))) for step in (4, 8))
    assert re.findall(r"^- (.*)", section(first, "FP16"), re.M) == ["The largest |x| is 5."]
    assert re.findall(r"^- (.*)", section(last, "FP16"), re.M) == whole["verdict"]
    entries.pop(0)
    hub_run.write_json(run / "eval" / "stability" / "stability.json", whole)
    assert "The largest" not in section(ModelCard(render_card(find_subject(run, 4))), "FP16")


def test_the_number_formats_are_those_of_the_checkpoint(tmp_path):
    run = hub_run.write_run(tmp_path)
    row = "| Cheapest number formats within 1% of FP32's loss (emulated) | "
    assert f"{row}not measured |" in render_card(find_subject(run))
    file = run / "eval" / "formats" / "step_00000008" / "formats.json"
    file.parent.mkdir(parents=True)
    hub_run.write_json(file, {"cheapest": {"weights": "INT8 per row", "stream": None}})
    assert f"{row}weights: INT8 per row; stream: none of those measured |" in render_card(find_subject(run))
    assert f"{row}not measured |" in render_card(find_subject(run, 4))


def test_an_overflow_is_said_wherever_it_was_recorded(tmp_path):
    run = hub_run.write_run(tmp_path)
    (run / "flight").mkdir()
    row = {"step": 5, "layer": 2, "sublayer": "attn", "tensor": "branch", "stat": "max_abs", "value": float("inf")}
    pd.DataFrame([row]).to_parquet(run / "flight" / "step_00000005.parquet")
    assert "in training | none, it overflowed (branch, layer 2 attn, step 5) |" in render_card(find_subject(run))
    assert "in training | 12.0 bits (" in render_card(find_subject(run, 4))


def test_a_loss_that_was_not_finite_is_not_a_number(tmp_path):
    run = hub_run.write_run(tmp_path, status="diverged")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[-3:]:
        line["loss"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| training loss (mean of the last tenth) | not finite |" in render_card(find_subject(run))


def test_bounds_count_as_within_fp16_with_its_rounding(tmp_path):
    run = hub_run.write_run(tmp_path)
    file = run / "eval" / "stability" / "certificate_00000008.json"
    record = json.loads(file.read_text())
    record["rows"][0] |= {"bound": 65500.0, "fp16_factor": 1.01}
    file.write_text(json.dumps(record))
    assert "1 of 2 tensors are bounded by the weights alone, 0 of them within 65,504" in render_card(find_subject(run))


def test_the_mean_of_a_seed_is_that_of_its_last_checkpoint(tmp_path):
    run = hub_run.write_run(tmp_path)
    record = json.loads((run / "eval" / "benchmarks-hub.json").read_text())
    for result in record["results"]:
        result |= {"value": 0.99, "n": 10}
    (run / "eval" / "benchmarks-limited.json").write_text(json.dumps(record | {"limit": 10}))
    record["evaluated"]["path"] = "checkpoints/step_00000004"
    (run / "eval" / "benchmarks-before.json").write_text(json.dumps(record))
    assert "| 40.00 % (mean of five, 0-shot) |" in section(ModelCard(render_card(find_subject(run))), "Seeds")


def test_a_card_of_a_revision_loads_that_revision():
    card = ModelCard(render_card(Subject(Path("x"), None), CardOptions("acme/tiny", revision="step_4")))
    assert card.text.count('"acme/tiny", revision="step_4"') == 2
    assert "pretrained=acme/tiny,revision=step_4" in card.text and "--model_revision step_4" in card.text


def test_how_to_load_asks_no_question(card):
    """Transformers asks in the terminal whether it may run the repository's code, for the tokenizer too."""
    loads = [line for line in section(card, "How to load").splitlines() if ".from_pretrained(" in line]
    assert len(loads) == 2 and all("trust_remote_code=True" in line for line in loads)


def test_a_field_of_the_recipe_that_is_null_is_none_and_not_unknown(tmp_path):
    run = hub_run.write_run(tmp_path)
    recipe = hub_run.recipe("peri", 1)
    recipe["optimizer"]["gradient_clip"] = None
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = render_card(find_subject(run))
    assert "| gradient clip | none |" in text and "| beta1 | not measured |" in text


def test_a_figure_is_shown_once_with_its_caption(tmp_path):
    run = hub_run.write_run(tmp_path)
    (run / "figures" / "headroom.svg").write_text("<svg/>")
    (run / "figures" / "headroom.txt").write_text("Headroom\n\nBits left\nof /home/somebody/runs/x.\n")
    card = ModelCard(render_card(find_subject(run), CardOptions(figures=("headroom.png", "headroom.svg"))))
    assert section(card, "Figures").strip() == "![Headroom](figures/headroom.png)\n\nBits left of …/x."


def test_a_fine_tuning_shows_both_recipes(tmp_path):
    run = hub_run.write_run(tmp_path)
    sft = run / "sft"
    sft.mkdir()
    (sft / "recipe.yaml").write_text("stage: sft\ndata: hub\nepochs: 15\nlearning_rate: 1.0e-05\nseed: 1\n")
    shutil.copytree(run / "checkpoints" / "step_00000008", sft / "checkpoints" / "step_00000002")
    card = ModelCard(render_card(find_subject(sft)))
    assert card.data.model_name == "peri_seed1-sft" and card.data.datasets == ["acme/text", "GAIR/lima"]
    assert "## Fine-tuning" in card.text and "| epochs | 15 |" in card.text
    assert "recipe of the pretraining" in card.text and "| weight decay | 0.033 |" in card.text
    assert "apply_chat_template" in card.text


def everything_of(run: Path) -> list[str]:
    return sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def names(runs) -> list[str]:
    return everything_of(runs / "peri_seed1")


def test_any_file_of_the_run_folder_may_be_missing(runs, names, tmp_path):
    """The card still renders; what the file held reads "not measured", and no number of it is left."""
    held = {
        "environment.json": "| device | not measured |",
        "metrics.jsonl": "| skipped steps | not measured |",
        "summary.json": "| status of the run | not measured |",
        "recipe.yaml": "| batch size | not measured |",
        "eval/stability/certificate_00000008.json": "| FP16 certificate (from the weights) | not measured |",
        "eval/stability/step_00000008.parquet": "| FP16 headroom on the stability bench | not measured |",
    }
    whole = render_card(find_subject(runs / "peri_seed1"))
    assert not [line for line in held.values() if line in whole]
    for name in names:
        run = shutil.copytree(runs / "peri_seed1", tmp_path / "runs" / "peri_seed1", dirs_exist_ok=True)
        (run / name).unlink()
        subject = Subject(run / "checkpoints" / "step_00000008", RunFolder(run))
        text = render_card(subject)
        assert held.get(name, "# peri_seed1") in text, name
        assert ModelCard(text).data.library_name == "transformers"


def test_without_any_record_every_number_is_missing(tmp_path):
    model = tmp_path / "model"
    weights = hub_run.model()
    weights.save_pretrained(model)
    text = render_card(find_subject(model))
    assert text.count("not measured") > 15
    assert (
        f"| parameters (with embeddings) | {weights.num_parameters():,} |" in text
    )  # counted from the header of the weights' file


def test_a_damaged_record_is_named(runs, tmp_path):
    run = shutil.copytree(runs / "peri_seed1", tmp_path / "run")
    (run / "environment.json").write_text("{")
    with pytest.raises(UserError, match="environment.json is not valid JSON"):
        render_card(find_subject(run))


@pytest.mark.parametrize(
    ("config", "drawn"),
    [
        ({"norm_placement": "pre"}, ["[ norm A ]--[ attention | MLP ]---+", "x --[ norm ]--[ head ]"]),
        ({"norm_placement": "post"}, ["(+)--[ norm C ]--> x", "x --[ head ]"]),
        ({"norm_placement": "peri"}, ["[ embedding ]--[ norm ]", "[ norm A ]--[ attention | MLP ]--[ norm B ]"]),
        ({"norm_placement": "deepnorm"}, ["( x 1.682 )", "[ norm C ]"]),
        ({"norm_placement": "mix"}, ["layer 1, attention", "layers 2 to 4, attention"]),
        ({"norm_placement": "peri", "residual_scale": "1/L"}, ["[ norm B ]--[ x 0.25 ]"]),
        ({"norm_placement": "lns"}, ["(factors: the first's)"]),
    ],
)
def test_the_drawing_is_that_of_the_plan(config, drawn):
    picture = diagram(plan_of({"model_type": "peri_llama", "num_hidden_layers": 4} | config))
    assert not [piece for piece in drawn if piece not in picture], picture
    assert ("norm B" in picture) == (config["norm_placement"] == "peri")


# The command


def test_the_command_writes_the_readme_once_and_leaves_others_alone(tmp_path, capsys):
    run = hub_run.write_run(tmp_path)
    readme = run / "checkpoints" / "step_00000008" / "README.md"
    args = render_command.parse([str(run), "--repo", "acme/x"])
    assert run_command(render_command.main, args) == 0
    assert readme.read_text() == render_card(find_subject(run), CardOptions("acme/x", figures=("headroom.png",)))
    assert run_command(render_command.main, args) == 0
    readme.write_text("mine")
    assert run_command(render_command.main, args) == 1
    assert "--force replaces it" in capsys.readouterr().err and readme.read_text() == "mine"
