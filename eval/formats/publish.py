"""What is made from the records: tables, the picture, and the text that the command prints."""

from typing import Any

import pandas as pd

from periln.eval.formats.files import FormatsFolder
from periln.eval.formats.heat_map import draw
from periln.eval.formats.recipes import ROWS, Recipe
from periln.eval.formats.summary import cheapest, row_of, said
from periln.eval.formats.table import formats_table
from periln.eval.formats.words import AS_IT_IS, CURED, PLACES
from periln.eval.text_table import Table, to_csv, to_markdown, to_terminal
from periln.runkit.folder import write_bytes, write_text


def _cells(records: FormatsFolder) -> list[tuple[str, Recipe, dict[str, Any]]]:
    """All rows in the folder, in the order of the table."""
    found = [(v, row, records.cell(v, row.key)) for v in (AS_IT_IS, CURED) for row in ROWS]
    return [(variant, row, record) for variant, row, record in found if record is not None]


def _notes(head: dict[str, Any]) -> list[str]:
    asked, unit = head["asked"], head["unit"]
    positions, tokens = head["reference"]["positions"], asked["samples"] * asked["tokens"]
    where = "" if positions == tokens else f" KL and top-1 at {positions} of the {tokens} positions."
    per = f"; FP32: {sum(head['reference']['nats']) / sum(head['sizes']) / 0.6931471805599453:.4f} bits a {unit}"
    notes = [f"{asked['samples']} samples of {asked['tokens']} tokens of {asked['data']}{per}.{where}"]
    notes += [f"Not measured: {PLACES[target]}, because {why}." for target, why in head.get("missing", {}).items()]
    cure = head.get("cure")
    if cure is not None and cure["refused"] is not None:
        notes.append(f"Not measured after the cure: {cure['refused']}.")
    elif cure is not None:
        notes.append("After the cure only plain casts can differ: a shared scale follows powers of two.")
    return notes


def publish(records: FormatsFolder) -> str:
    """Write formats.json, .csv, .md, .png and slots.csv; returns the table and sentences for a terminal."""
    head, cells = records.head, _cells(records)
    if not cells:
        records.write_head(rows=[], cheapest={}, said=[])
        return "nothing could be measured: " + "; ".join(head.get("missing", {}).values())
    nats, sizes = head["reference"]["nats"], head["sizes"]
    rows = [(recipe, row_of((variant, recipe, record), nats, sizes)) for variant, recipe, record in cells]
    found = cheapest(rows)
    sentences = said(rows, found)
    records.write_head(rows=[row for _, row in rows], cheapest=found, said=sentences)
    title = f"Which number formats {head['name']} survives"
    table = formats_table(title, rows, head["unit"], _notes(head))
    write_text(records.folder / "formats.csv", to_csv(table))
    listed = "".join(f"- {sentence}\n" for sentence in sentences)
    write_text(records.folder / "formats.md", f"{to_markdown(table)}\n{listed}")
    write_text(records.folder / "slots.csv", to_csv(_slots(cells)))
    picture = draw(title, [(recipe, record) for variant, recipe, record in cells if variant == AS_IT_IS])
    if picture is not None:
        write_bytes(records.folder / "formats.png", picture)
    return f"{to_terminal(table)}\n\n{listed}"


def _slots(cells: list[tuple[str, Recipe, dict[str, Any]]]) -> Table:
    rows = [
        {"variant": variant, "group": recipe.group, "row": recipe.name} | slot
        for variant, recipe, record in cells
        for slot in record["slots"]
    ]
    frame = pd.DataFrame(rows)
    return Table("slots", frame, frame)
