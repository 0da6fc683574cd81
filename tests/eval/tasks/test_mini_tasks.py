"""Tests of the bundled mini tasks: the rows, the prompts and the scoring in lm-eval. No network is used."""

from __future__ import annotations

import json
import re
import socket
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

TASKS_DIR = Path(__file__).resolve().parents[3] / "eval" / "tasks"
N_ITEMS = 48

ARC, HELLA, PIQA, SIQA, WINO = TASKS = (
    "mini_arc_easy",
    "mini_hellaswag",
    "mini_piqa",
    "mini_social_iqa",
    "mini_winogrande",
)

# The stock task file behind each mini task, in lm-eval's own tasks folder.
STOCK = {
    ARC: "arc/arc_easy.yaml",
    HELLA: "hellaswag/hellaswag.yaml",
    PIQA: "piqa/piqa.yaml",
    SIQA: "siqa/siqa.yaml",
    WINO: "winogrande/default.yaml",
}
METRICS = {
    ARC: ["acc", "acc_norm"],
    HELLA: ["acc", "acc_norm"],
    PIQA: ["acc", "acc_norm"],
    SIQA: ["acc"],
    WINO: ["acc"],
}

# The type of every field of a row; these fields and no others.
SCHEMAS: dict[str, dict[str, type]] = {
    ARC: {"id": str, "question": str, "choices": dict, "answerKey": str},
    HELLA: {
        "ind": int,
        "activity_label": str,
        "ctx_a": str,
        "ctx_b": str,
        "ctx": str,
        "endings": list,
        "source_id": str,
        "split": str,
        "split_type": str,
        "label": str,
    },
    PIQA: {"goal": str, "sol1": str, "sol2": str, "label": int},
    SIQA: {"context": str, "question": str, "answerA": str, "answerB": str, "answerC": str, "label": str},
    WINO: {"sentence": str, "option1": str, "option2": str, "answer": str},
}
LABELS: dict[str, list[Any]] = {
    ARC: ["A", "B", "C", "D"],
    HELLA: ["0", "1", "2", "3"],
    PIQA: [0, 1],
    SIQA: ["1", "2", "3"],
    WINO: ["1", "2"],
}
GOLD_FIELD = {ARC: "answerKey", HELLA: "label", PIQA: "label", SIQA: "label", WINO: "answer"}


def read_rows(name: str) -> list[dict[str, Any]]:
    """Read the rows of one task."""
    with (TASKS_DIR / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def question_of(name: str, row: dict[str, Any]) -> str:
    """Return what makes a row's question unique."""
    if name == SIQA:
        return f"{row['context']} {row['question']}"
    return row[{ARC: "question", HELLA: "ctx", PIQA: "goal", WINO: "sentence"}[name]]


def options_of(name: str, row: dict[str, Any]) -> list[str]:
    """Return a row's options in the order of its labels."""
    if name == ARC:
        return row["choices"]["text"]
    if name == HELLA:
        return row["endings"]
    fields = {PIQA: ("sol1", "sol2"), SIQA: ("answerA", "answerB", "answerC"), WINO: ("option1", "option2")}[name]
    return [row[field] for field in fields]


def gold_index(name: str, row: dict[str, Any]) -> int:
    """Return the index of the right option."""
    return LABELS[name].index(row[GOLD_FIELD[name]])


# ------------------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize("name", TASKS)
def test_rows_follow_the_schema(name: str) -> None:
    rows = read_rows(name)
    assert len(rows) == N_ITEMS
    for row in rows:
        assert {field: type(value) for field, value in row.items()} == SCHEMAS[name]
        assert row[GOLD_FIELD[name]] in LABELS[name]
        options = options_of(name, row)
        assert len(options) == len(LABELS[name])
        assert len({option.lower() for option in options}) == len(options)
        for text in [question_of(name, row), *options]:
            assert text and text == text.strip() and text.isascii()
            assert not re.search(r"\s\s|[\[\]\n]", text)


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_unique(name: str) -> None:
    questions = Counter(question_of(name, row).lower() for row in read_rows(name))
    assert max(questions.values()) == 1


@pytest.mark.parametrize("name", TASKS)
def test_gold_labels_are_balanced_and_mixed(name: str) -> None:
    gold = [gold_index(name, row) for row in read_rows(name)]
    n_labels = len(LABELS[name])
    share = N_ITEMS / n_labels
    for label in range(n_labels):
        assert abs(gold.count(label) - share) <= 0.3 * share
    # No label answers a long stretch, and no short cycle of labels answers the whole set.
    assert not any(len(set(gold[i : i + 6])) == 1 for i in range(N_ITEMS - 5))
    for period in range(1, 9):
        assert any(gold[i] != gold[i - period] for i in range(period, N_ITEMS))


@pytest.mark.parametrize("name", [ARC, HELLA, PIQA, SIQA])
def test_length_does_not_give_the_gold_away(name: str) -> None:
    longest = shortest = 0
    for row in read_rows(name):
        lengths = [len(option) for option in options_of(name, row)]
        gold = lengths.pop(gold_index(name, row))
        longest += gold > max(lengths)
        shortest += gold < min(lengths)
    limit = 1.5 * N_ITEMS / len(LABELS[name])
    assert longest <= limit
    assert shortest <= limit


def test_arc_ids_and_labels() -> None:
    for number, row in enumerate(read_rows(ARC), 1):
        assert row["id"] == f"mini_arc_easy_{number:03d}"
        assert set(row["choices"]) == {"text", "label"}
        assert row["choices"]["label"] == LABELS[ARC]


def test_hellaswag_fields() -> None:
    for number, row in enumerate(read_rows(HELLA), 1):
        assert row["ind"] == number
        assert row["source_id"] == f"mini~{number:03d}"
        assert (row["split"], row["split_type"]) == ("val", "mini")
        assert row["ctx"] == f"{row['ctx_a']} {row['ctx_b']}"
        # The prompt capitalizes ctx_b, which lowers every later letter: names must not be there.
        assert row["ctx_b"] and row["ctx_b"] == row["ctx_b"].lower()


def test_winogrande_blank_and_twins() -> None:
    rows = read_rows(WINO)
    for row in rows:
        assert row["sentence"].count("_") == 1
        before, after = row["sentence"].split("_")
        assert before.endswith(" ") and after.startswith(" ") and len(after.split()) >= 2
        for option in options_of(WINO, row):
            assert re.search(rf"\b{re.escape(option)}\b", before)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert options_of(WINO, first) == options_of(WINO, second)
        assert {first["answer"], second["answer"]} == {"1", "2"}
        words = [row["sentence"].split() for row in (first, second)]
        differing = [i for i, (one, two) in enumerate(zip(*words, strict=True)) if one != two]
        assert len(differing) == 1
        assert differing[0] > words[0].index("_"), "the trigger word belongs to the scored part"


def test_no_machine_paths_in_the_task_files() -> None:
    for path in sorted(TASKS_DIR.glob("mini_*")):
        if path.suffix in {".yaml", ".jsonl", ".py"}:
            assert not re.search(r"/(home|work|root|tmp|Users)/", path.read_text(encoding="utf-8")), path.name


# ------------------------------------------------------------------------------------------- the tasks in lm-eval

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")

# The first row of each task as the stock format renders it, written out by hand: (context, continuation) pairs.
_ARC_1 = (
    "Question: Mina leaves a wet paintbrush on a sunny windowsill and finds it dry two hours later. "
    "What happened to the water in the bristles?\nAnswer:"
)
_HELLA_1 = (
    "Washing dishes: A woman fills the sink with hot water and squeezes in some soap. "
    "She sets a stack of dirty plates beside the sink. She"
)
_PIQA_1 = "Question: How do you stop a cut avocado half from turning brown?\nAnswer:"
_SIQA_1 = (
    "Q: Lucia forgot her lunch at home, so Omar gave her half of his sandwich. How would Lucia feel afterwards?\nA:"
)
FIRST_REQUESTS = {
    ARC: [
        (_ARC_1, " It changed from a liquid to a gas."),
        (_ARC_1, " It changed from a gas to a liquid."),
        (_ARC_1, " It changed from a liquid to a solid."),
        (_ARC_1, " It changed from a solid to a liquid."),
    ],
    HELLA: [
        (_HELLA_1, " picks up a sponge and scrubs the first plate."),
        (_HELLA_1, " spreads butter over each plate with a brush."),
        (_HELLA_1, " pours the soapy water into a row of cups."),
        (_HELLA_1, " puts the dirty plates right back in the cupboard."),
    ],
    PIQA: [
        (_PIQA_1, " Rub lemon juice on the cut side and wrap it tightly."),
        (_PIQA_1, " Rub lemon juice on the skin side and wrap it tightly."),
    ],
    SIQA: [
        (_SIQA_1, " grateful to Omar"),
        (_SIQA_1, " afraid of Omar"),
        (_SIQA_1, " angry with Omar"),
    ],
    WINO: [
        ("Nadia asked Brigid to translate the menu because Nadia", " spoke little Italian."),
        ("Nadia asked Brigid to translate the menu because Brigid", " spoke little Italian."),
    ],
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make every attempt to reach a network fail, and record it."""
    attempts: list[Any] = []

    def refuse(*args: Any, **_: Any) -> None:
        attempts.append(args)
        raise OSError("no network in this test")

    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


def load_tasks(folder: Path, names: list[str]) -> dict[str, Any]:
    """Build tasks from the YAML files of one folder, without lm-eval's own tasks."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False).load(names)["tasks"]


def requests_of(task: Any) -> list[tuple[str, str]]:
    """Return the (context, continuation) pairs that a model is asked to score."""
    task.build_all_requests(rank=0, world_size=1)
    return [instance.args for instance in task.instances]


@needs_lm_eval
def test_tasks_build_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = load_tasks(TASKS_DIR, list(TASKS))
    assert sorted(tasks) == sorted(TASKS)
    for name, task in tasks.items():
        rows = read_rows(name)
        assert len(task.eval_docs) == N_ITEMS
        assert task.OUTPUT_TYPE == "multiple_choice"
        assert task.VERSION == 1.0
        assert [metric["metric"] for metric in task.config.metric_list] == METRICS[name]
        requests = requests_of(task)
        n_options = len(LABELS[name])
        assert len(requests) == N_ITEMS * n_options
        assert requests[:n_options] == FIRST_REQUESTS[name]
        for doc, row in zip(task.eval_docs, rows, strict=True):
            gold = task.doc_to_text(doc) if name == WINO else task.doc_to_target(doc)
            assert gold == gold_index(name, row)
    assert not no_network


@needs_lm_eval
def test_prompts_equal_those_of_the_stock_tasks(tmp_path: Path, no_network: list[Any]) -> None:
    """Build lm-eval's own task files on our rows and compare every request."""
    stock_dir = Path(find_spec("lm_eval").origin).parent / "tasks"
    (tmp_path / "stock_rows.py").write_text(
        "import json\n"
        "from pathlib import Path\n"
        "from datasets import Dataset\n"
        "def load(rows_file, **_):\n"
        "    rows = Dataset.from_list([json.loads(line) for line in Path(rows_file).read_text().splitlines()])\n"
        "    return {'train': rows, 'validation': rows, 'test': rows}\n",
        encoding="utf-8",
    )
    for name in TASKS:
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {json.dumps(str(stock_dir / STOCK[name]))}\n"
            f"task: stock_{name}\n"
            "custom_dataset: !function stock_rows.load\n"
            f"dataset_kwargs:\n  rows_file: {json.dumps(str(TASKS_DIR / f'{name}.jsonl'))}\n",
            encoding="utf-8",
        )
    stock = load_tasks(tmp_path, [f"stock_{name}" for name in TASKS])
    ours = load_tasks(TASKS_DIR, list(TASKS))
    for name in TASKS:
        one, other = ours[name], stock[f"stock_{name}"]
        assert requests_of(one) == requests_of(other)
        assert one.config.metric_list == other.config.metric_list
        for field in ("output_type", "target_delimiter", "fewshot_delimiter", "description", "filter_list"):
            assert one.get_config(field) == other.get_config(field)
    assert not no_network


def gold_request(name: str, row: dict[str, Any]) -> tuple[str, str]:
    """Return the (context, continuation) pair of the right option, by the stock format."""
    gold = options_of(name, row)[gold_index(name, row)]
    if name == WINO:
        before, after = row["sentence"].split("_")
        return before + gold, " " + after.strip()
    if name == HELLA:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    elif name == SIQA:
        context = f"Q: {row['context']} {row['question']}\nA:"
    else:
        context = f"Question: {question_of(name, row)}\nAnswer:"
    return context, " " + gold


@needs_lm_eval
@pytest.mark.parametrize("always_right", [True, False], ids=["perfect", "always_wrong"])
def test_scores_of_a_known_scorer(
    always_right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[Any]
) -> None:
    import lm_eval
    import lm_eval.evaluator
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    gold = {gold_request(name, row) for name in TASKS for row in read_rows(name)}
    assert len(gold) == N_ITEMS * len(TASKS)

    class Scorer(LM):
        """Give the right continuation a far better (or far worse) score than any other."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return [(-1.0 if (request.args in gold) == always_right else -1000.0, False) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            raise NotImplementedError

    monkeypatch.chdir(tmp_path)
    # The report about the machine takes seconds and has no part in the scores.
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    report = lm_eval.simple_evaluate(
        model=Scorer(),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(TASKS_DIR), include_defaults=False),
        bootstrap_iters=0,
    )
    for name in TASKS:
        assert report["n-samples"][name] == {"original": N_ITEMS, "effective": N_ITEMS}
        for metric in METRICS[name]:
            assert report["results"][name][f"{metric},none"] == float(always_right)
    assert not no_network
