"""What pyproject.toml cannot say: which packages there are, and a README whose links hold outside the repository."""

import re
import tomllib
from pathlib import Path

from setuptools import find_namespace_packages, setup

FOLDERS = ("eval", "model_cards", "runkit", "scripts", "sft")  # in the checkout; installed they are periln.eval, ...
urls = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
inside = find_namespace_packages(include=[*FOLDERS, *(f"{folder}.*" for folder in FOLDERS)], exclude=["*__pycache__*"])
readme = Path("README.md").read_text(encoding="utf-8")
readme = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{urls['Repository']}/raw/main/", readme)
readme = re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{urls['Repository']}/blob/main/", readme)

setup(
    packages=["modeling_periln", "periln", *(f"periln.{name}" for name in inside)],
    long_description=readme,
    long_description_content_type="text/markdown",
)
