"""`python -m scripts.coordinate_check RECIPE.yaml --out DIR`: rules compared over widths and depths.

coordinate_check.json   what was run, every row, and the verdicts
coordinate_check.md     the verdicts as a table
coordinate_check.png    the change of every tensor over the size
"""

import argparse
from typing import Any

from periln.runkit.folder import write_bytes, write_json, write_text
from periln.runkit.process import start_stage
from periln.runkit.progress import progress_bar
from periln.runkit.recipes import apply_overrides, from_mapping, read_yaml
from periln.scripts.arguments.coordinate_check import RESULT, check
from periln.scripts.coordinate_check.measure import JUDGED, TENSORS, measure, recipe_of, verdicts
from periln.scripts.coordinate_check.picture import draw
from periln.scripts.recipe import Recipe


def sizes_of(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """(axis, width, depth) of every model: the widths at the least depth, the depths at the least width."""
    width, depth = min(args.widths), min(args.depths)
    found = [("width", one, depth) for one in args.widths if len(args.widths) > 1]
    return found + [("depth", width, one) for one in args.depths if len(args.depths) > 1]


def table(found: list[dict[str, Any]], tolerance: float) -> str:
    """The verdicts as Markdown: the power of the size in each tensor's change."""
    lines = ["| rule | axis | sizes | " + " | ".join(TENSORS) + " | |", "|---|---|---|" + "---|" * (len(TENSORS) + 1)]
    for one in found:
        powers = [
            f"{one['powers'][t]:+.2f}" if t in JUDGED[one["axis"]] else f"({one['powers'][t]:+.2f})" for t in TENSORS
        ]
        said = "passes" if one["passes"] else "fails"
        sizes = ", ".join(map(str, one["sizes"]))
        lines.append(f"| {one['rule']} | {one['axis']} | {sizes} | {' | '.join(powers)} | {said} |")
    note = f"Power of the size in the mean |change| of a tensor; at most {tolerance:g} passes. In brackets: not judged."
    return "\n".join([*lines, "", note])


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    base = from_mapping(Recipe, apply_overrides(read_yaml(args.recipe), args.set, Recipe))
    sizes, smallest = sizes_of(args), (min(args.widths), min(args.depths))
    planned = [
        (rule, axis, width if axis == "width" else depth,
         recipe_of(base, rule, width, depth, smallest, args.vocabulary))
        for rule in args.rules
        for axis, width, depth in sizes
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    with progress_bar(args, len(planned) * args.seeds, "coordinate check", "model") as bar:
        for rule, axis, size, recipe in planned:
            for seed in range(args.seeds):
                shared = {"rule": rule, "axis": axis, "size_of_model": size, "seed": seed}
                rows += [shared | row for row in measure(recipe, args.steps, tuple(args.batch), seed)]
                bar.update()
    found = verdicts(rows, args.tolerance)
    asked = {
        "recipe": str(args.recipe), "set": args.set, "steps": args.steps, "seeds": args.seeds, "batch": args.batch,
        "vocabulary": args.vocabulary, "tolerance": args.tolerance, "base_width": smallest[0],
        "base_depth": smallest[1], "optimizer": base.optimizer.name, "learning_rate": base.optimizer.learning_rate,
    }  # fmt: skip
    write_json(args.out / RESULT, {"asked": asked, "verdicts": found, "rows": rows})
    text = table(found, args.tolerance)
    write_text(args.out / RESULT.replace(".json", ".md"), text + "\n")
    write_bytes(args.out / RESULT.replace(".json", ".png"), draw(found, args.steps))
    print(f"{text}\n\n{args.out / RESULT}")
