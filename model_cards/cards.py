"""A model card: metadata for the Hub and, for people, what the run folder says.

Rendered through huggingface_hub's `ModelCard`; templates/card.md.j2 holds the words, `facts` the numbers.
"""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from periln.model_cards.facts import (
    MISSING,
    best_results,
    hardware,
    markdown,
    number,
    outcome,
    recipe_rows,
    results,
    score_table,
    seed_table,
    stability_rows,
    tokens_seen,
    verdict,
)
from periln.model_cards.placement import EQUATION, diagram, norms_in_words, plan_of
from periln.model_cards.subject import Subject
from periln.runkit.number_format import FP16
from periln.runkit.placements import placement_name
from periln.runkit.public import public
from periln.runkit.tasks import SUITES, TASKS

TEMPLATES = Path(__file__).resolve().parent / "templates"
PAPER = "2502.02732"
LIBRARY, PIPELINE = "transformers", "text-generation"


@dataclass(frozen=True)
class CardOptions:
    """What no record can say. `datasets` go into the metadata; `repo` is where the card will be."""

    repo: str | None = None
    license: str = "apache-2.0"
    language: tuple[str, ...] = ("en",)
    datasets: tuple[str, ...] = field(default=())
    figures: tuple[str, ...] = field(default=())  # names of images in the repository's folder `figures`
    revision: str | None = None  # the branch that the card will be on; None: main


METRIC_NAMES = {"acc": "accuracy", "acc_norm": "accuracy, normalized by length"}


def eval_results(subject: Subject) -> list[EvalResult]:
    """The five benchmarks' scores as the Hub's model index has them: fractions, acc and acc_norm.

    Which of several records counts, `runkit.scores` says. The mini sets are not benchmarks and are left out.
    """
    best, found = best_results(subject), []
    for task in TASKS:
        for metric, words in METRIC_NAMES.items():
            if (r := best.get((task.name, metric))) is not None:
                found.append(
                    EvalResult(
                        task_type=PIPELINE,
                        task_name="Text generation",
                        dataset_type=task.dataset,
                        dataset_name=task.title,
                        dataset_config=task.config,
                        dataset_split=task.split,
                        dataset_args={"num_few_shot": r.get("num_fewshot"), "items": r.get("n")},
                        metric_type=metric,
                        metric_name=words,
                        metric_value=r["value"],
                        source_name=r["harness"] or "lm-eval",
                        source_url="https://github.com/EleutherAI/lm-evaluation-harness",
                    )
                )
    return found


def card_data(subject: Subject, options: CardOptions) -> ModelCardData:
    """The metadata."""
    placement, scores = placement_name(subject.config, "not recorded"), eval_results(subject)
    datasets = list(options.datasets) or _recorded_datasets(subject)
    if subject.recipe.get("stage") == "sft" and subject.recipe.get("data") == "hub" and "GAIR/lima" not in datasets:
        datasets.append("GAIR/lima")
    tags = ["peri-llama" if subject.config.get("model_type") == "peri_llama" else subject.config.get("model_type")]
    return ModelCardData(
        model_name=options.repo.split("/")[-1] if options.repo else subject.name,
        license=options.license,
        language=list(options.language),
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        datasets=datasets or None,
        eval_results=scores or None,
        tags=[t for t in [*tags, placement if " " not in placement else None, f"arxiv:{PAPER}"] if t],
    )


def _recorded_datasets(subject: Subject) -> list[str]:
    """The data set of the Hub that the tokens are from; a fine-tuning's are those of its pretraining."""
    owner = Subject(None, subject.parent) if subject.parent is not None else subject
    source = str((owner.environment.get("data") or {}).get("source") or "")
    return [source.removeprefix("hf:")] if source.startswith("hf:") else []


def _sizes(subject: Subject) -> list[tuple[str, str]]:
    c, s = subject.config, subject.summary
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    names += ("vocab_size", "max_position_embeddings", "norm_type", "qk_norm", "residual_scale", "tie_word_embeddings")
    rows = [("parameters (with embeddings)", number(subject.parameters))]
    rows.append(("parameters without embeddings", number(s.get("parameters_non_embedding"))))
    return rows + [(name.replace("_", " "), str(public(c[name]))) for name in names if c.get(name) is not None]


def normalized(card: ModelCard) -> str:
    """The card's text with no more than one empty line in a row, and none at the end of a line."""
    lines: list[str] = []
    for line in str(card).splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).rstrip() + "\n"


def render_card(subject: Subject, options: CardOptions = CardOptions()) -> str:
    """The card of a checkpoint as the text of README.md. What the run folder lacks reads "not measured".

    Raises:
        UserError: a record is damaged; names the path.
    """
    plan, config = plan_of(subject.config), subject.config
    stage = subject.recipe.get("stage")
    scored = list(dict.fromkeys(r["task"] for r in results(subject) if r.get("harness")))
    minis = [task for task in scored if task.startswith("mini_")]
    before = Subject(None, subject.parent) if subject.parent is not None else None
    card = ModelCard.from_template(
        card_data(subject, options),
        template_path=str(TEMPLATES / "card.md.j2"),
        title=options.repo.split("/")[-1] if options.repo else subject.name,
        repo=options.repo or "ORG/NAME",
        revision=options.revision,
        ours=config.get("model_type") == "peri_llama",
        architecture=(config.get("architectures") or [str(config.get("model_type"))])[0],
        placement=placement_name(config, "not recorded"),
        equation=EQUATION,
        fp16_limit=FP16.limit,
        norms=norms_in_words(plan) if plan else None,
        drawing=diagram(plan) if plan else None,
        parameters=number(subject.parameters),
        tokens=number(tokens_seen(subject)),
        sizes=markdown(_sizes(subject), ("size", "")),
        stage={"pretrain": "Pretraining", "sft": "Fine-tuning"}.get(stage, "Training"),
        recipe=markdown(recipe_rows(subject), ("recipe", "")),
        before=markdown(recipe_rows(before), ("recipe of the pretraining", "")) if before else None,
        outcome=markdown(outcome(subject), ("result", "")),
        hardware=markdown(hardware(subject), ("hardware and time", "")),
        scores=score_table(subject),
        benchmarks=bool(eval_results(subject)),
        tasks=",".join([task for task in scored if task not in minis] if scored else SUITES["hub"]),
        mini_tasks=",".join(minis),
        seeds=seed_table(subject),
        stability=markdown(rows, ("FP16", "")) if (rows := stability_rows(subject)) else "",
        verdict=verdict(subject),
        figures=figures_of(subject, options.figures),
        chat=_has_chat_template(subject),
        diverged=subject.summary.get("status") == "diverged",
        unfinished=subject.summary.get("status") not in ("completed", "diverged"),
        missing=MISSING,
    )
    return normalized(card)


def figures_of(subject: Subject, names: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """The images to show, each with a title and a caption: what the text file next to it holds, the title first.

    If an image exists as PNG and as SVG, the PNG is shown.
    """
    found = []
    for name in names:
        if name.endswith(".png") or f"{Path(name).stem}.png" not in names:
            file = (subject.records / "figures" / name).with_suffix(".txt")
            said = str(public(file.read_text(encoding="utf-8", errors="replace"))) if file.exists() else name
            title, _, caption = said.strip().partition("\n")
            found.append((name, title, " ".join(caption.split())))
    return found


def _has_chat_template(subject: Subject) -> bool:
    return subject.checkpoint is not None and (subject.checkpoint / "chat_template.jinja").exists()
