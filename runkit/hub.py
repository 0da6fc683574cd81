"""Errors of the Hugging Face Hub's clients, as one sentence."""

import os
import re

from periln.runkit.errors import UsageError, UserError


def quiet_hub() -> None:
    """Keep the Hub's clients from writing a line for every retry: the one sentence at the end says it all."""
    from datasets.utils import logging as datasets_logging
    from huggingface_hub.utils import logging as hub_logging

    for each in (datasets_logging, hub_logging):
        each.set_verbosity_error()


def hub_reason(error: BaseException) -> str:
    """Why the Hub did not give what was asked for: the rest of a sentence that names it."""
    chain: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(chain) < 8:
        chain.append(f"{type(seen).__name__}: {seen}")
        seen = seen.__cause__ or seen.__context__
    text, short = " ".join(chain), f"({' '.join(str(error).split())[:200]})"
    low = text.lower()
    if "GatedRepo" in text or "is a gated" in low:  # a repository that is missing is called "private or gated" as well
        return "it is gated on the Hub: accept its terms on its page there and log in (hf auth login)"
    if "OfflineMode" in text or "offline mode" in low or "LocalEntryNotFound" in text:
        return "it is not on this machine and the Hub is switched off (HF_HUB_OFFLINE) or does not answer"
    if "RevisionNotFound" in text:
        return f"the Hub has no such revision of it {short}"
    if "DatasetNotFound" in text or "RepositoryNotFound" in text:
        return f"the Hub does not have it, or not without a login {short}"
    if re.search(r"connect|timed out|timeout|resolve host|name resolution|unreachable", low):
        return f"the Hub ({os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}) does not answer"
    return f"the Hub did not give it {short}"


def hub_error(said: str, error: BaseException) -> UserError:
    """The sentence `said` with the Hub's reason: a usage error where the Hub has no such thing, else a failure."""
    reason = hub_reason(error)
    kind = UsageError if reason.startswith(("the Hub has ", "the Hub does not have ")) else UserError
    return kind(f"{said} {reason}")
