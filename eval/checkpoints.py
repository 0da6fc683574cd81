"""What is evaluated: a run folder's newest checkpoint, a checkpoint folder, or a model of the Hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modeling_periln  # noqa: F401 (registers PeriLlama with the auto classes)
from runkit.errors import UsageError, UserError
from runkit.folder import RunFolder, weights_hash
from runkit.hub import hub_reason, quiet_hub

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")  # of a Hub model; never a pickle


@dataclass(frozen=True)
class Target:
    """A checkpoint to evaluate, and the folder that gets the results.

    `path` is what the results call it: within the run folder, a folder's name, or the Hub's id; `revision` the Hub's
    commit.
    """

    name: str
    checkpoint: Path
    results: Path
    path: str | None = None  # None: the checkpoint's name
    revision: str | None = None
    trust_remote_code: bool = False

    def evaluated(self) -> dict[str, Any]:
        """What was evaluated: path (within the run folder), revision, hash of the weights."""
        path = self.path or self.checkpoint.name
        return {"path": path, "revision": self.revision, "weights_sha256": weights_hash(self.checkpoint)}

    def load(self, device: str, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model (in the saved dtype unless another is named, in evaluation mode) and tokenizer.

        Raises:
            UserError: neither can be loaded; in one sentence.
        """
        trust = {"trust_remote_code": self.trust_remote_code}
        with self._said_in_one_sentence():
            model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=dtype, use_safetensors=True, **trust)
            tokenizer = AutoTokenizer.from_pretrained(self.checkpoint, **trust)
        return model.to(torch.device(device)).eval(), tokenizer

    def positions(self) -> int | None:
        """How many tokens the model has positions for; None where it has no such limit.

        Raises:
            UserError: its configuration cannot be read; in one sentence.
        """
        with self._said_in_one_sentence():
            config = AutoConfig.from_pretrained(self.checkpoint, trust_remote_code=self.trust_remote_code)
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    @contextmanager
    def _said_in_one_sentence(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # an architecture, a file or a shape that does not fit shows itself in many ways
            text = " ".join(str(error).split())
            if "trust_remote_code" in text:
                raise UserError(
                    f"{self.name} brings code of its own, which is only run with --trust-remote-code: read it first"
                ) from error
            raise UserError(f"{self.name} cannot be loaded as a causal LM ({text[:200]})") from error


def find_target(path: Path, trust_remote_code: bool = False) -> Target | None:
    """The target that a run folder or checkpoint folder stands for.

    None for a run that has diverged, and for the fine-tuning that would have followed from one.

    Raises:
        UserError: the path is neither, or a run without a checkpoint, or a checkpoint without a tokenizer.
    """
    path = path.resolve()
    if (path / "recipe.yaml").exists():
        run = RunFolder(path)
        if run.status == "diverged":
            return None
        if not run.checkpoints():
            raise UserError(f"{path} has no checkpoint (status: {run.status or 'not started'})")
        checkpoint, results, name = run.checkpoints()[-1], path / "eval", path.name
    elif (path / "config.json").exists() or (path / "adapter_config.json").exists():
        # A checkpoint of a run writes to the run; any other to a folder of its own.
        run = path.parent.parent if (path.parent.parent / "recipe.yaml").exists() else path.parent
        checkpoint, results, name = path, run / "eval" if run != path.parent else path / "eval", path.name
    elif not path.exists() and RunFolder(path.parent).status == "diverged":
        return None
    else:
        raise UserError(f"{path} is neither a run folder (recipe.yaml) nor a checkpoint (config.json)")
    if (checkpoint / "adapter_config.json").exists():
        raise UserError(
            f"{checkpoint} holds an adapter alone: merge it (sft.train --peft --merge), and evaluate merged/"
        )
    _check_files(checkpoint)
    inside = checkpoint.is_relative_to(results.parent) and checkpoint != results.parent
    shown = str(checkpoint.relative_to(results.parent)) if inside else checkpoint.name
    return Target(name, checkpoint, results, shown, trust_remote_code=trust_remote_code)


def _check_files(checkpoint: Path) -> None:
    if not (checkpoint / "tokenizer_config.json").exists():
        raise UserError(f"{checkpoint} has no tokenizer (tokenizer_config.json)")
    if not any(checkpoint.glob("*.safetensors")):
        raise UserError(f"{checkpoint} has no weights in safetensors; pickled ones (.bin, .pt) are not read")


def find_model(name: str, revision: str | None, trust_remote_code: bool, out: Path | None) -> Target | None:
    """The target of a path, else of a Hub id; `out` is a folder for results, in the place of the run's `eval/`.

    Raises:
        UsageError: a revision of a local path; a Hub id without `out`.
        UserError: see `find_target`; the Hub has no such model or revision, or does not answer.
    """
    path = Path(name)
    if path.exists() or not _HUB_ID.fullmatch(name) or RunFolder(path.parent).status == "diverged":
        if revision is not None:
            raise UsageError(f"--revision {revision} is for models of the Hub, and {name} is none")
        target = find_target(path, trust_remote_code)
        if target is None or out is None:
            return target
        return Target(target.name, target.checkpoint, out / target.name, target.path, None, trust_remote_code)
    if out is None:
        raise UsageError(f"{name} is no folder here; for a model of the Hub name a folder for its results with --out")
    checkpoint, commit = _download(name, revision)
    folder = f"{name.replace('/', '--')}-{commit[:8]}"
    return Target(name, checkpoint, out / folder, name, commit, trust_remote_code)


def _download(name: str, revision: str | None) -> tuple[Path, str]:
    """The folder of a Hub model in the cache (weights in safetensors, never pickles), and its commit."""
    from huggingface_hub import HfApi, constants, snapshot_download

    quiet_hub()
    at = f"{name}@{revision}" if revision else name
    try:
        if constants.is_offline_mode():
            found = snapshot_download(name, revision=revision, local_files_only=True)
            return Path(found), Path(found).name
        info = HfApi().model_info(name, revision=revision)
        # What stands in folders is another format of the same, or no part of the model.
        files = [s.rfilename for s in info.siblings if "/" not in s.rfilename and s.rfilename.endswith(_FILES)]
        if not any(file.endswith(".safetensors") for file in files):
            raise UserError(f"{at} has no weights in safetensors; pickled ones (.bin, .pt) are not read")
        found = Path(snapshot_download(name, revision=info.sha, allow_patterns=files))
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises a dozen kinds; the user needs one sentence
        raise UserError(f"{at} is no folder here, and {hub_reason(error)}") from error
    _check_files(found)
    return found, info.sha
