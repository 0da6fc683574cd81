"""Send a checkpoint to the Hub: `python -m scripts.push RUN_OR_CHECKPOINT --repo ORG/NAME`.

Weights, configuration, code, tokenizer, card, figures, evaluations and the run's records go in one commit; what the
repository has already is not sent, so that an interrupted push resumes where it was. `--all-checkpoints` also sends
each of the run's checkpoints as a separate revision (`step_2000`). Endpoint and token are huggingface_hub's:
HF_ENDPOINT, and HF_TOKEN or `hf auth login`.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

from periln.model_cards.cards import CardOptions
from periln.model_cards.subject import Subject, find_subject
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import sha256_of
from periln.runkit.process import start_stage
from periln.scripts.arguments.push import check
from periln.scripts.push.files import WEIGHTS, Upload, check_uploads, files_of, is_ours

MAIN = "main"


@dataclass(frozen=True)
class Push:
    """One commit: the files of a checkpoint for a revision of the repository."""

    subject: Subject
    revision: str
    files: list[Upload]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def readable(size: float) -> str:
    """Bytes in powers of 1000: `512 B`, `1.2 kB`, `3.1 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def plan(args: argparse.Namespace) -> list[Push]:
    """What is to be sent, read and checked, before a word goes over the network.

    Raises:
        UsageError, UserError: a name that the Hub refuses, a diverged run, a damaged checkpoint, a path or a token in a
            file.
    """
    subject = find_subject(args.target, args.step)
    for run in (subject.run, subject.parent):
        if run is not None and run.status == "diverged" and not args.force:
            reason = run.summary.get("reason") or "no reason recorded"
            raise UserError(f"{run.path} diverged ({reason}): it is not sent without --force")
    revision = args.revision or (step_name(subject) if args.step is not None else MAIN)
    wanted = [(subject, revision)]
    if args.all_checkpoints:
        if subject.run is None:
            raise UsageError(f"--all-checkpoints is for a run folder, and {args.target} is a checkpoint without a run")
        every = (find_subject(path) for path in subject.run.checkpoints())
        wanted += [(each, step_name(each)) for each in every]
    options = {"license": args.license, "language": tuple(args.language), "datasets": tuple(args.datasets)}
    pushes = []
    for each, name in wanted:
        card = CardOptions(args.repo, revision=None if name == MAIN else name, **options)
        pushes.append(Push(each, name, files_of(each, card)))
    for push in pushes:
        check_uploads(push.files, push.subject, get_token())
    return pushes


def step_name(subject: Subject) -> str:
    """`step_2000`: what a checkpoint's revision is called."""
    if subject.step is None:
        raise UserError(f"{subject.checkpoint} is not called by its step: give --revision")
    return f"step_{subject.step}"


def show(pushes: Iterable[Push], repo: str, state: Callable[[Push, Upload], str] | None = None) -> None:
    """Print every file with its size, and where it goes."""
    for push in pushes:
        source = push.subject.checkpoint.name
        print(f"{repo} at {push.revision}, from {source}: {len(push.files)} files, {readable(push.size)}")
        width = max(len(file.name) for file in push.files)
        for file in push.files:
            more = f"  {state(push, file)}" if state else ""
            print(f"  {file.name:{width}}  {file.size:>14,} B{more}")


# --- the Hub -------------------------------------------------------------------------------------------------


def is_there(file: Upload, remote: dict[str, RepoFile]) -> bool:
    """Whether the revision holds this very content: by SHA-256 for a large file, else by git's hash."""
    entry = remote.get(file.name)
    if entry is None or entry.size != file.size:
        return False
    if entry.lfs is not None:
        content = file.content
        own = sha256_of(content) if isinstance(content, Path) else sha.sha256(content).hexdigest()
        return own == entry.lfs.sha256
    return sha.git_hash(file.content.read_bytes() if isinstance(file.content, Path) else file.content) == entry.blob_id


def _open_repository(api: HfApi, repo: str, private: bool) -> None:
    api.create_repo(repo, private=True if private else None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise UserError(f"{repo} exists and is public: nothing was sent (--private is for a new repository)")


def send(api: HfApi, repo: str, push: Push) -> None:
    """One revision: create the branch if it is not there, send what differs, and commit it as a whole.

    Large files go first, each by itself: what has arrived stays with the Hub, and a push that is interrupted and
    repeated finds it there. Then one commit names them all, so that a revision is never half of a push. Files of an
    earlier push that this one does not have are deleted; anything else in the repository is left alone.
    """
    if push.revision != MAIN:
        start = api.list_repo_commits(repo)[-1].commit_id  # the empty first commit: no file of another revision
        api.create_branch(repo, branch=push.revision, revision=start, exist_ok=True)
    entries = api.list_repo_tree(repo, recursive=True, revision=push.revision)
    remote = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    changed = [file for file in push.files if not is_there(file, remote)]
    names = {file.name for file in push.files}
    stale = sorted(name for name in remote if is_ours(name) and name not in names)
    news = {file.name: "replaces" if file.name in remote else "new" for file in changed}
    show([push], repo, lambda _, file: news.get(file.name, "unchanged, not sent"))
    for name in stale:
        print(f"  {name}  deleted: of an earlier push")
    if not changed and not stale:
        print(f"{repo} at {push.revision}: nothing to send")
        return
    additions = []
    for file in changed:
        addition = CommitOperationAdd(file.name, str(file.content) if isinstance(file.content, Path) else file.content)
        if WEIGHTS.fullmatch(file.name):
            api.preupload_lfs_files(repo, [addition], revision=push.revision, free_memory=False)
        additions.append(addition)
    operations: list[Any] = [*additions, *(CommitOperationDelete(name) for name in stale)]
    message = f"Push {push.subject.name}, {push.subject.checkpoint.name}"
    done = api.create_commit(repo, operations, commit_message=message, revision=push.revision)
    kept = len(push.files) - len(changed)
    print(f"{repo} at {push.revision}: {len(changed)} files sent, {kept} unchanged, commit {done.oid}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from: the client wraps what happens to an upload."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _why(error: Exception, repo: str, endpoint: str) -> str | None:
    """One sentence on what the Hub or the network refused, without a header or a token; None for any other error."""
    refused = next((e for e in _causes(error) if isinstance(e, HfHubHTTPError)), None)
    status = getattr(getattr(refused, "response", None), "status_code", None)
    if status == 401:
        return f"{endpoint} does not accept the token (401): set HF_TOKEN to one that may write, or `hf auth login`"
    if status == 403:
        return f"the token may not write to {repo} (403)"
    if isinstance(refused, RepositoryNotFoundError):
        return f"{repo} is not to be found at {endpoint}, or not open to this token"
    if refused is not None:
        said = getattr(refused, "server_message", None) or (str(refused).splitlines() or [""])[0]
        return f"{endpoint} refused the push ({status}): {' '.join(said.split())}"
    broken = next((e for e in _causes(error) if isinstance(e, OSError) or _is_network(e)), None)
    if broken is None:
        return None
    reason = " ".join(str(broken).split()) or "the connection ended"
    if "xet" in reason and "404" in reason:
        return f"{endpoint} does not know the Xet protocol: set HF_HUB_DISABLE_XET=1"
    if isinstance(broken, OfflineModeIsEnabled):
        return "the Hub is switched off (HF_HUB_OFFLINE): nothing was sent"
    return (
        f"the push to {repo} was interrupted ({type(broken).__name__}: {reason}); start it again with the same "
        "command: what has arrived is not sent again"
    )


def _is_network(error: BaseException) -> bool:
    # By the module's name: which HTTP library the client has is its own affair, and has changed before.
    return type(error).__module__.split(".")[0].startswith(("httpx", "httpcore", "requests", "urllib3"))


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    pushes = plan(args)
    if args.dry_run:
        show(pushes, args.repo)
        count, size = sum(len(p.files) for p in pushes), sum(p.size for p in pushes)
        print(f"dry run: {count} files, {readable(size)}; nothing was sent")
        return
    token = get_token()
    if not token:
        raise UserError("no access token: set HF_TOKEN, or log in with `hf auth login`")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token, library_name="peri-llama")
    try:
        _open_repository(api, args.repo, args.private)
        for push in pushes:
            send(api, args.repo, push)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # the client's own kinds, and its HTTP library's: one sentence for each
        why = _why(error, args.repo, api.endpoint)
        if args.debug or why is None:
            raise
        raise UserError(why) from error
    print(f"{api.endpoint}/{args.repo}")
