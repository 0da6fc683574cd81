"""A checkpoint carries its code: it loads where this package is not installed.

And it loads again after it was re-saved, with the package or without.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_ids, shaken_model, tiny_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import modeling_periln
from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM, PeriLlamaModel

PACKAGE = Path(modeling_periln.__file__).parent
CODE = {
    *("configuration_periln.py", "modeling_periln.py", "arguments.py", "registration.py"),
    *("norms.py", "placements.py", "slots.py", "loss.py", "rotary.py", "residual.py"),
    *("attention_fields.py", "embedding.py", "masks.py", "sublayers.py", "outputs.py", "heads.py"),
    *("pretrained.py", "generation.py"),
}
WEIGHTS = {"config.json", "generation_config.json", "model.safetensors"}
MODELS = {
    "peri": {"norm_placement": "peri", "qk_norm": "head"},
    "mix": {"norm_placement": "mix", "norm_type": "layernorm"},
    "users": {"norm_placement": {"input_norm": True, "output_norm": True, "s": "1/sqrt(2L)", "final_norm": True}},
}


# The files


@pytest.mark.parametrize("placement", ["post", "peri"])
def test_a_saved_model_carries_exactly_the_flat_siblings_that_it_needs(placement, tmp_path):
    shaken_model(norm_placement=placement).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == CODE | WEIGHTS
    for name in CODE:
        assert (tmp_path / name).read_bytes() == (PACKAGE / name).read_bytes()


def test_the_base_model_carries_the_same_code(tmp_path):
    shaken_model().model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == CODE | {"config.json", "model.safetensors"}


def test_a_saved_config_carries_what_the_config_needs(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "configuration_periln.py",
        "attention_fields.py",
        "placements.py",
        "slots.py",
    }


def test_the_model_file_reaches_every_file_that_is_shipped_and_no_other():
    reached = {Path(f).name for f in get_relative_import_files(PACKAGE / "modeling_periln.py")}
    assert reached | {"modeling_periln.py"} == CODE


@pytest.mark.parametrize("name", sorted(CODE))
def test_a_shipped_file_imports_its_siblings_relatively_and_else_only_torch_and_transformers(name):
    source = (PACKAGE / name).read_text()
    siblings, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno}: only `from .module import ...` is found by the loader"
            assert node.module is not None, f"line {node.lineno}: `from . import x` is not found by the loader"
            assert "." not in node.module, f"line {node.lineno}: the folder is flat"
            siblings.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    assert {f"{module}.py" for module in siblings} <= CODE
    assert others <= {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
    # The loader searches the text, docstrings included, for lines that look like imports.
    assert set(get_relative_imports(PACKAGE / name)) == siblings


def test_configuration_has_no_postponed_annotations():
    """`from __future__ import annotations` would switch the strict type checks off."""
    tree = ast.parse((PACKAGE / "configuration_periln.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "__future__"]


def test_with_the_package_a_checkpoint_loads_as_the_packages_own_classes(tmp_path):
    """Registered classes win over the code in the folder: no question is asked, no code of the folder is run."""
    model = shaken_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_periln.py").write_text("raise RuntimeError('this file must not be run')")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is PeriLlamaForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is PeriLlamaModel
    assert type(AutoConfig.from_pretrained(tmp_path)) is PeriLlamaConfig
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)


# A process without the package

FRESH = """
import importlib.abc, json, sys
from pathlib import Path

class Absent(importlib.abc.MetaPathFinder):  # as if the package were not installed, even where it is
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_periln":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import modeling_periln
except ModuleNotFoundError:
    pass
else:
    sys.exit("the package can be imported: this process proves nothing")

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

root = Path(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
report = {}
for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.endswith("_again")):
    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trust)
    model = AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
    base = AutoModel.from_pretrained(folder, **trust).eval()
    with torch.no_grad():
        logits, hidden = model(ids).logits, base(ids).last_hidden_state
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
    save_file({"logits": logits, "hidden": hidden, "tokens": tokens}, root / f"{folder.name}.safetensors")
    again = folder.with_name(folder.name + "_again")
    model.save_pretrained(again)
    with torch.no_grad():
        resaved = AutoModelForCausalLM.from_pretrained(again, **trust).eval()(ids).logits
    report[folder.name] = {
        "classes": [type(x).__name__ for x in (config, model, base)],
        "modules": sorted({type(x).__module__.split(".")[0] for x in (config, model, base)}),
        "placement": config.norm_placement,
        "resaved": torch.equal(resaved, logits),
        "imported": [name for name in sys.modules if name.split(".")[0] == "modeling_periln"],
    }
print("REPORT" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """One folder a model; for `peri` also one that was loaded with the package and saved again."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, changes in MODELS.items():
        shaken_model(**changes).save_pretrained(root / name)
    PeriLlamaForCausalLM.from_pretrained(root / "peri").save_pretrained(root / "peri_resaved")
    return root


@pytest.fixture(scope="module")
def report(checkpoints, tmp_path_factory) -> dict:
    """What a fresh process, elsewhere and without the package, made of those folders."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    environment |= {"HF_HOME": str(elsewhere / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", FRESH, str(checkpoints), json.dumps(random_ids().tolist())],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("REPORT")[2])


@pytest.mark.slow
def test_every_checkpoint_was_loaded_without_the_package(report):
    assert set(report) == {*MODELS, "peri_resaved"}
    for name, seen in report.items():
        assert seen["classes"] == ["PeriLlamaConfig", "PeriLlamaForCausalLM", "PeriLlamaModel"]
        assert seen["modules"] == ["transformers_modules"]
        assert seen["imported"] == []
        assert seen["placement"] == MODELS[name.removesuffix("_resaved")]["norm_placement"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "peri_resaved"])
def test_remote_code_computes_bitwise_the_same(name, report, checkpoints):
    assert name in report
    model = shaken_model(**MODELS[name.removesuffix("_resaved")])
    ids = random_ids()
    there = load_file(checkpoints / f"{name}.safetensors")
    assert torch.equal(there["logits"], model(ids).logits)
    assert torch.equal(there["hidden"], model.model(ids).last_hidden_state)
    assert torch.equal(there["tokens"], model.generate(ids, max_new_tokens=5, do_sample=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "peri_resaved"])
def test_what_remote_code_saves_again_is_whole(name, report, checkpoints):
    """Loaded as remote code and re-saved, a checkpoint still has its code and points to no other repository."""
    assert report[name]["resaved"] is True
    again = checkpoints / f"{name}_again"
    assert {p.name for p in again.iterdir()} == CODE | WEIGHTS
    auto_map = json.loads((again / "config.json").read_text())["auto_map"]
    assert auto_map == PeriLlamaConfig().auto_map
    weights, original = load_file(again / "model.safetensors"), load_file(checkpoints / name / "model.safetensors")
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[key], original[key]) for key in original)


@pytest.mark.slow
def test_what_remote_code_saved_loads_with_the_package(report, checkpoints):
    loaded = PeriLlamaForCausalLM.from_pretrained(checkpoints / "peri_again")
    assert type(loaded.config) is PeriLlamaConfig
    assert torch.equal(loaded(random_ids()).logits, shaken_model(**MODELS["peri"])(random_ids()).logits)
