"""What is measured: a run folder's checkpoints, a checkpoint folder, or a model of the Hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import modeling_periln  # noqa: F401 (registers PeriLlama with the auto classes)
from runkit.checkpoints import damage_of
from runkit.errors import UsageError, UserError
from runkit.folder import RunFolder, weights_hash
from runkit.hub import hub_error

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def _not_loaded(path: Path, error: Exception) -> UserError:
    hint = "; --trust-remote-code lets it run its own" if "trust_remote_code" in str(error) else ""
    return UserError(f"cannot load {path}: {' '.join(str(error).split())[:300]}{hint}")


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights on disk: its step (0 outside of runs) and the folder that it is loaded from."""

    step: int
    path: Path

    def config(self, trust_remote_code: bool) -> Any:
        """The model's configuration.

        Raises:
            UserError: it cannot be read, or its code would have to be trusted.
        """
        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=trust_remote_code)
        except Exception as error:
            raise _not_loaded(self.path, error) from error

    def load(self, dtype: torch.dtype, device: str, trust_remote_code: bool) -> torch.nn.Module:
        """The model, in `dtype`, from safetensors alone.

        Raises:
            UserError: it cannot be loaded, its code would have to be trusted, or it lacks weights (Transformers fills
                them with random numbers).
        """
        if not any(self.path.glob("*.safetensors")):
            raise UserError(f"{self.path} has no .safetensors file (weights in pickles are not read)")
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
        try:
            model, info = AutoModelForCausalLM.from_pretrained(self.path, output_loading_info=True, **options)
        except Exception as error:
            raise _not_loaded(self.path, error) from error
        if missing := sorted(info["missing_keys"]):
            raise UserError(f"{self.path} lacks {len(missing)} of the model's weights, {missing[0]} the first")
        return model.to(torch.device(device)).eval()


@dataclass(frozen=True)
class Model:
    """A model that was asked for: its name, its checkpoints, oldest first, and the folder of its run, if it has one."""

    name: str
    asked: str
    revision: str | None
    checkpoints: tuple[Checkpoint, ...]
    run: Path | None

    @property
    def has_tokenizer(self) -> bool:
        """Whether its last checkpoint has one: from a folder without, Transformers makes one that knows no word."""
        return _has_tokenizer(self.checkpoints[-1].path)

    def tokenizer(self, other: str | None, trust_remote_code: bool) -> Any:
        """The tokenizer of its last checkpoint, or `other`.

        Raises:
            UserError: there is none.
        """
        source = other or self.checkpoints[-1].path
        if Path(source).is_dir() and not _has_tokenizer(Path(source)):
            raise UsageError(f"{source} has no tokenizer: name one with --tokenizer, or measure on --data random")
        try:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        except Exception as error:
            raise UserError(
                f"the tokenizer of {self.asked} cannot be loaded ({' '.join(str(error).split())[:200]}): "
                "name another with --tokenizer, or measure on --data random"
            ) from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _TOKENIZERS)


def _of_run(path: Path, asked: str) -> Model:
    run = RunFolder(path)
    found = []
    for checkpoint in run.checkpoints():
        damage = damage_of(checkpoint)
        if damage is None:
            found.append(Checkpoint(int(checkpoint.name.removeprefix("step_")), checkpoint))
        else:
            print(f"passing over a checkpoint: {damage}")
    if not found:
        raise UserError(f"{path} has no whole checkpoint (status: {run.status or 'not started'})")
    return Model(path.name, asked, None, tuple(found), path)


def _of_hub(asked: str, revision: str | None, trust_remote_code: bool) -> Model:
    from huggingface_hub import snapshot_download

    files = [*_FILES, "*.py"] if trust_remote_code else _FILES
    try:
        path = Path(snapshot_download(asked, revision=revision, allow_patterns=files))
    except Exception as error:
        raise hub_error(f"{asked} is no folder here, and as an id of the Hub", error) from error
    return Model(asked.replace("/", "--"), asked, path.name, (Checkpoint(0, path),), None)


def find_model(asked: str, revision: str | None = None, trust_remote_code: bool = False) -> Model:
    """The model that a path or a Hub id stands for.

    Raises:
        UserError: it is neither a run, nor a checkpoint, nor a model of the Hub; or a run without a whole checkpoint.
    """
    path = Path(asked)
    if not path.exists():
        if _HUB_ID.fullmatch(asked) and not asked.startswith("."):
            return _of_hub(asked, revision, trust_remote_code)
        raise UsageError(f"{asked} does not exist, and is no id of the Hub")
    path = path.resolve()
    if (path / "recipe.yaml").exists() and not (path / "config.json").exists():
        return _of_run(path, asked)
    if (path / "adapter_config.json").exists():
        raise UserError(f"{asked} holds an adapter alone: merge it (sft.train --peft --merge), and measure merged/")
    if not (path / "config.json").exists():
        raise UsageError(f"{asked} is neither a run folder (recipe.yaml) nor a checkpoint (config.json)")
    run = path.parent.parent
    if path.parent.name == "checkpoints" and (run / "recipe.yaml").exists() and path.name.startswith("step_"):
        return Model(run.name, asked, None, (Checkpoint(int(path.name.removeprefix("step_")), path),), run)
    return Model(path.name, asked, None, (Checkpoint(0, path),), None)


def hash_of(checkpoint: Checkpoint) -> str:
    """SHA-256 over the checkpoint's safetensors files."""
    return weights_hash(checkpoint.path)
