"""Our own mini rows, laid out as the five benchmarks' and LIMA's repositories for the local Hub.

The unmodified lm-eval tasks and the real `datasets` client then run against them; no row of a benchmark is here.
"""

import json
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT / "eval" / "tasks"
CARD = "---\nconfigs:\n- config_name: {config}\n  default: true\n  data_files:\n{files}---\nTest rows.\n"
REPOSITORIES = {
    "allenai/ai2_arc": ("ARC-Easy", TASKS / "mini_arc_easy.jsonl", ("train", "validation", "test")),
    "Rowan/hellaswag": ("default", TASKS / "mini_hellaswag.jsonl", ("train", "validation")),
    "baber/piqa": ("default", TASKS / "mini_piqa.jsonl", ("train", "validation")),
    "lighteval/siqa": ("default", TASKS / "mini_social_iqa.jsonl", ("train", "validation")),
    "allenai/winogrande": ("winogrande_xl", TASKS / "mini_winogrande.jsonl", ("train", "validation")),
    "GAIR/lima": ("plain_text", ROOT / "sft" / "data" / "mini_conversations.jsonl", ("train",)),
}


def write_store(root: Path, rows: int = 12) -> Path:
    """Fill `root` with the dataset repositories, `rows` rows a split; returns it."""
    for name, (config, source, splits) in REPOSITORIES.items():
        records = [json.loads(line) for line in source.read_text().splitlines()]
        # Of LIMA's rows the last are multi-turn, and marked so.
        chosen = records[: rows - 2] + records[-2:]
        if name == "GAIR/lima":
            for record in chosen:
                record["source"] = "multi_turn" if len(record["conversations"]) > 2 else "stackexchange"
        folder = root / "datasets" / name
        (folder / config).mkdir(parents=True)
        files = ""
        for split in splits:
            pd.DataFrame(chosen).to_parquet(folder / config / f"{split}-00000-of-00001.parquet", index=False)
            files += f"  - split: {split}\n    path: {config}/{split}-*.parquet\n"
        (folder / "README.md").write_text(CARD.format(config=config, files=files))
    return root
