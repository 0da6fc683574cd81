"""A checkout runs its own code under its own names, with nothing installed and next to a stale installation."""

import sys

import pytest
from copies import FOLDERS, copy_to, dependencies, run

from periln.verbs import OTHERS, VERBS

COMMANDS = sorted({verb.command for verb in VERBS} - {"convert"} | set(OTHERS))
# -S: no site-packages, hence no .pth files either, whose finders would find an editable installation.
BARE = [sys.executable, "-S"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return copy_to(tmp_path_factory.mktemp("clone"), *FOLDERS)


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
    """Site-packages with an older wheel, all of whose modules say so when they are imported."""
    site = tmp_path_factory.mktemp("stale")
    names = [f"periln/{name}" for name in ("eval", "model_cards", "runkit", "scripts", "sft", "")]
    for name in names:
        (site / name).mkdir(parents=True, exist_ok=True)
        (site / name / "__init__.py").write_text("")
    for command in COMMANDS:
        for module in (f"{command}", f"{command.rpartition('.')[0]}.arguments"):
            (site / "periln" / module.replace(".", "/")).with_suffix(".py").write_text("raise SystemExit('stale')")
    for module in ("start", "verbs", "command_line", "runkit/errors"):
        (site / "periln" / f"{module}.py").write_text("raise SystemExit('stale')")
    return site


def path_of(*folders: object) -> str:
    return ":".join(map(str, [*folders, *dependencies()]))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_from_a_clone_with_nothing_installed(clone, command):
    done = run(*BARE, "-m", command, "--help", cwd=clone, PYTHONPATH=path_of())
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m {command} "), done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_a_clone_do_not_run_a_stale_installation(clone, stale, tmp_path, command):
    inside = run(*BARE, "-m", command, "--help", cwd=clone, PYTHONPATH=path_of(stale))
    assert inside.returncode == 0 and inside.stdout.startswith(f"usage: python -m {command} "), inside.stderr
    # From another folder, the installation before the clone.
    outside = run(*BARE, "-m", command, "--help", cwd=tmp_path, PYTHONPATH=path_of(stale, clone))
    assert outside.stdout == inside.stdout, outside.stderr


def test_the_stale_installation_is_one(stale, tmp_path):
    done = run(*BARE, "-m", "periln.eval.report", cwd=tmp_path, PYTHONPATH=path_of(stale))
    assert (done.returncode, done.stderr) == (1, "stale\n")


def test_the_work_of_a_command_is_the_clones_too(clone, stale, tmp_path):
    code = (
        "from pathlib import Path; import sys, eval.records, runkit.folder\n"
        "ours = [m for m in list(sys.modules.values()) if (getattr(m, '__name__', '') + '.').startswith('periln.')]\n"
        "assert len(ours) > 5\n"
        "files = {m.__name__: m.__file__ for m in ours}\n"
        "assert all(Path(sys.argv[1]) in Path(file).parents for file in files.values()), files\n"
    )
    done = run(*BARE, "-c", code, clone.resolve(), cwd=tmp_path, PYTHONPATH=path_of(stale, clone))
    assert done.returncode == 0, done.stderr


def test_another_copy_that_is_imported_already_is_refused(clone, stale, tmp_path):
    done = run(*BARE, "-c", "import periln, eval.report", cwd=tmp_path, PYTHONPATH=path_of(stale, clone))
    assert done.returncode == 1
    assert f"eval is the folder in {clone.resolve()}, but periln was imported from {stale}" in done.stderr


def test_both_names_are_one_module(clone, tmp_path):
    code = (
        "import periln.eval.text_table, eval.text_table, periln.runkit.errors, runkit.errors\n"
        "import runkit, periln.runkit, eval.fp16.families as a, periln.eval.fp16.families as b\n"
        "assert eval.text_table is periln.eval.text_table and runkit.errors is periln.runkit.errors\n"
        "assert runkit is periln.runkit and a is b\n"
        "assert runkit.errors.__name__ == runkit.errors.__spec__.name == 'periln.runkit.errors'\n"
    )
    done = run(*BARE, "-c", code, cwd=clone, PYTHONPATH=path_of())
    assert done.returncode == 0, done.stderr


SPAWNS = '''"""A command whose children are spawned, and get classes by pickle."""
import multiprocessing
import sys

from periln.start import start
from periln.scripts.data.sources import Document

if __name__ == "__main__":
    sys.exit(start("scripts.spawns", lambda argv: __import__("argparse").Namespace(debug=True), lambda args: None))

def work(document):
    import periln, scripts.data.sources
    same = type(document) is scripts.data.sources.Document is sys.modules["periln.scripts.data.sources"].Document
    return same, periln.__file__, document.name

def main(args):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(work, [Document("x", "y")])[0])
'''


def test_spawned_children_run_the_clone_and_share_its_classes(clone, stale):
    (clone / "scripts" / "spawns.py").write_text(SPAWNS)
    done = run(*BARE, "-m", "scripts.spawns", cwd=clone, PYTHONPATH=path_of(stale))
    assert done.stdout.split() == ["True", str(clone.resolve() / "periln" / "__init__.py"), "x"], done.stderr


def test_a_checkout_elsewhere_on_the_disk_is_not_asked_for_its_commit(tmp_path):
    """Installed into a virtual environment inside somebody's repository, the code has no commit."""
    site = copy_to(tmp_path / "project" / "site-packages" / "periln", "runkit")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import periln.runkit.environment as e; print(e._commit())"
    (tmp_path / "project").joinpath("file").write_text("")
    for words in (("init", "-q"), ("add", "file"), ("-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "x")):
        assert run("git", "-C", tmp_path / "project", *words, cwd=tmp_path).returncode == 0
    (site / "runkit" / "__init__.py").write_text("")
    done = run(*BARE, "-c", code, site.parent, cwd=tmp_path, PYTHONPATH=path_of())
    assert done.stdout == "{'commit': None, 'uncommitted_changes': None}\n", done.stderr
