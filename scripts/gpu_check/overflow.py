"""Section `overflow`: a sum beyond FP16's range is seen, named and skipped, eager and compiled."""

import pandas as pd
import torch

from periln.scripts.gpu_check.notes import Notes
from periln.scripts.gpu_check.place import Place, step
from periln.scripts.training.trainer import Trainer

MODULE = "model.layers.0.attn_residual"


def plant(trainer: Trainer) -> None:
    """Stream 60,000 and attention 30,000, both of which FP16 holds; their sum it does not."""
    width = trainer.model.config.hidden_size
    values = {
        "embed_tokens": 60_000.0,
        "layers.0.self_attn.v_proj": 1 / width,
        "layers.0.self_attn.o_proj": 30_000 / width,
    }
    with torch.no_grad():
        for name, value in values.items():
            trainer.model.get_parameter(f"model.{name}.weight").fill_(value)


def check_overflow(place: Place, notes: Notes) -> None:
    for compiled in (False, True):
        how = "compiled" if compiled else "eager"
        if not notes.has_time(how, 5):
            return
        recipe = place.tiny(name=f"overflow_{how}", compile=compiled, model={"norm_placement": "pre"})
        trainer = place.trainer(recipe)
        plant(trainer)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        record = step(trainer, witness=True)
        kind = record["skip_kind"], record["skip_module"]
        notes.check(f"{how}: the skip and its module", kind == ("forward", MODULE), kind, f"forward, {MODULE}")
        same = all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
        notes.check(f"{how}: weights after the skip", same, same, "untouched")
        rows = pd.read_parquet(trainer.run.path / "layers" / "step_00000000.parquet")
        at = (rows.tensor == "residual_add") & (rows.layer == 1) & (rows.sublayer == "attn") & (rows.stat == "max_abs")
        largest = float(rows[at].value.iloc[0])
        notes.check(f"{how}: the sum that is recorded", largest == float("inf"), largest, "inf, not 90,000")
