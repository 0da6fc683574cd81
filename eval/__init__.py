"""Evaluation: benchmarks through lm-eval, held-out loss, samples, tables, figures, the report."""

if __name__ == "eval":  # a folder of a checkout, whose modules are those of `periln.eval`
    import runpy
    from pathlib import Path

    runpy.run_path(str(Path(__file__).parents[1] / "periln" / "checkout.py"))["bind"](__name__)
