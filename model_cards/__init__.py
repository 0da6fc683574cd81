"""Model cards and the index of a zoo: pure functions of run folders on disk.

Below the stages: this package imports `modeling_periln` and `runkit` only; `scripts.push` uses its `cards`, `subject`
and the options of `render`, and nothing else.
"""

if __name__ == "model_cards":  # a folder of a checkout, whose modules are those of `periln.model_cards`
    import runpy
    from pathlib import Path

    runpy.run_path(str(Path(__file__).parents[1] / "periln" / "checkout.py"))["bind"](__name__)
