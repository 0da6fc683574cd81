"""Supervised fine-tuning on LIMA-format conversations, through TRL."""

if __name__ == "sft":  # a folder of a checkout, whose modules are those of `periln.sft`
    import runpy
    from pathlib import Path

    runpy.run_path(str(Path(__file__).parents[1] / "periln" / "checkout.py"))["bind"](__name__)
