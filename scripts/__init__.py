"""Pretraining: text -> tokens -> checkpoints, and the demo that runs the whole path."""

if __name__ == "scripts":  # a folder of a checkout, whose modules are those of `periln.scripts`
    import runpy
    from pathlib import Path

    runpy.run_path(str(Path(__file__).parents[1] / "periln" / "checkout.py"))["bind"](__name__)
