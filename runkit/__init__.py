"""What the stages share: the run folder, recipes, errors, and real FP16.

`scripts`, `eval` and `sft` do not import each other; what one hands to the next is a run folder on disk, and
how such a folder is read and written is defined here. Nothing in this package knows a stage.
"""

if __name__ == "runkit":  # a folder of a checkout, whose modules are those of `periln.runkit`
    import runpy
    from pathlib import Path

    runpy.run_path(str(Path(__file__).parents[1] / "periln" / "checkout.py"))["bind"](__name__)
