"""The benchmark tasks, one row each: a new task is a new row here, and its mini twin in eval/tasks/.

Data sets as lm-eval 0.4.13 reads them. The order is that of every table.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task of lm-eval: its name there, our own small items in its schema, and what tables and cards say of it."""

    name: str
    title: str
    chance: float  # accuracy of guessing, percent
    folder: str  # of lm_eval/tasks that holds it
    dataset: str  # repository of the Hub
    config: str
    split: str

    @property
    def mini(self) -> str:
        return f"mini_{self.name}"


TASKS = (
    Task("arc_easy", "ARC-Easy", 25.0, "arc", "allenai/ai2_arc", "ARC-Easy", "test"),
    Task("hellaswag", "HellaSwag", 25.0, "hellaswag", "Rowan/hellaswag", "default", "validation"),
    Task("piqa", "PIQA", 50.0, "piqa", "baber/piqa", "default", "validation"),
    Task("social_iqa", "SIQA", 100 / 3, "siqa", "lighteval/siqa", "default", "validation"),
    Task("winogrande", "Winogrande", 50.0, "winogrande", "allenai/winogrande", "winogrande_xl", "validation"),
)
SUITES = {"mini": tuple(task.mini for task in TASKS), "hub": tuple(task.name for task in TASKS)}
CHANCE = tuple(task.chance for task in TASKS)  # percent, in the order of a suite's tasks
METRICS = ("acc", "acc_norm")
COUNT = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")[len(TASKS)]  # in words
