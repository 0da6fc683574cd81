"""The verbs of the command `periln`, as data."""

from typing import NamedTuple

NAME = "peri-llama"


class Verb(NamedTuple):
    """`periln bench` is `python -m eval.stability`; it needs what the extra `bench` brings."""

    name: str
    command: str
    extra: str
    sentence: str


VERBS = (
    Verb("convert", "convert", "", "Convert a checkpoint between PeriLlama and a stock class"),
    Verb("bench", "eval.stability", "bench", "Measure what a norm placement does to any causal LM"),
    Verb("cure", "eval.fp16", "bench", "Rewrite a model so that it runs in FP16, the same function"),
    Verb("formats", "eval.formats", "bench", "Measure which number formats a causal LM survives"),
    Verb("retrofit", "scripts.retrofit", "train", "Give a trained checkpoint another norm placement"),
    Verb("retrofit-report", "eval.retrofit", "bench", "Report what a retrofit costs and gives"),
    Verb("widen", "eval.widen", "gguf", "Widen a GGUF file to a model folder that every stage reads"),
    Verb("bounds", "eval.bounds", "bench", "Bound a model's gradients and residual steps"),
    Verb("figures", "eval.figures", "bench", "Redraw the paper's figures from run folders"),
    Verb("report", "eval.report", "bench", "Write tables, figures and a report of all runs in a folder"),
    Verb("demo", "scripts.demo", "eval,sft", "Run the Peri-LN study in miniature"),
    Verb("prepare-data", "scripts.prepare_data", "data", "Turn text into a tokenizer and token shards"),
    Verb("pretrain", "scripts.pretrain", "train", "Pretrain the runs that recipes describe"),
    Verb("sweep", "scripts.sweep", "train", "Run placements x learning rates x seeds from one YAML"),
    Verb("study", "scripts.study", "eval", "Give every claim of the paper a verdict, within a budget"),
    Verb("plan", "scripts.plan", "train", "Plan a recipe's parameters, FLOPs, memory and time"),
    Verb("gpu-check", "scripts.gpu_check", "data", "Check the trainer on a GPU in one call of six minutes"),
    Verb("coordinate-check", "scripts.coordinate_check", "train", "Check that rates hold at any width and depth"),
    Verb("benchmarks", "eval.benchmarks", "eval", "Score checkpoints on tasks of lm-evaluation-harness"),
    Verb("evaluate", "eval.evaluate", "eval", "Measure benchmarks, held-out loss and samples of checkpoints"),
    Verb("loss", "eval.loss", "eval", "Measure the loss on random documents"),
    Verb("live", "eval.live", "bench", "Show running pretrainings and sweeps on a page of this machine"),
    Verb("watch", "eval.watch", "eval", "Score a run's checkpoints while it trains"),
    Verb("tables", "eval.tables", "eval", "Draw the paper's tables from your own runs"),
    Verb("sft", "sft.train", "sft", "Fine-tune on LIMA-format conversations"),
    Verb("select", "sft.select", "sft", "Choose a fine-tuning's epoch, and evaluate it"),
    Verb("compare", "sft.compare", "sft", "Report on fine-tunings, before and after"),
    Verb("serve", "sft.serve", "serve", "Serve a fine-tuned checkpoint"),
    Verb("push", "scripts.push", "train", "Send a checkpoint with its card and records to the Hub"),
    Verb("card", "model_cards.render", "train", "Write the model cards of runs or checkpoints"),
    Verb("zoo", "model_cards.zoo", "train", "Write an index page of local checkpoints"),
)
# Commands without a verb, run with `python -m` alone.
OTHERS = {"eval.bench": "eval", "eval.study": "bench", "scripts.bench": "train", "model_cards.paper": "train"}


def extra_of(command: str) -> str:
    """The extra of the distribution that a command needs; empty where it needs none."""
    return next((verb.extra for verb in VERBS if verb.command == command), OTHERS.get(command, "dev"))


def install_line(extra: str) -> str:
    """What to type for the packages of an extra."""
    return f"pip install '{NAME}[{extra}]'" if extra else f"pip install {NAME}"
