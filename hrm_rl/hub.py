"""Files on the Hugging Face Hub: "hf://owner/name" and the name of a file there, to a path on this machine."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from hrm_rl.errors import UserError


def on_hub(source: str | Path) -> str | None:
    """The source as "hf://owner/name" where it is one (a Path turns // into /), else None."""
    text = str(source)
    return "hf://" + text[3:].lstrip("/") if text.startswith("hf:/") else None


def fetch(source: str, filename: str, kind: str) -> Path:
    """The file of that name in the repository hf://owner/name, from the Hub or from its client's cache.

    kind: model or dataset. UserError in one line for a malformed name, what is not there, and no network.
    """
    repo = source.removeprefix("hf://")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"{source}: must read hf://owner/name")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(f"{source}: needs huggingface_hub (pip install huggingface_hub)") from None
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx", "urllib3", "requests")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:  # retries and warnings: the one line below says it all
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Path(hf_hub_download(repo_id=repo, filename=filename, repo_type=kind))
    except Exception as error:  # the Hub client has no common base for wrong names, no access and no network
        raise UserError(f"{source}: cannot fetch {filename} ({_reason(error, kind)})") from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: Exception, kind: str) -> str:
    """In a few words why the Hub gave nothing."""
    no_file = f"the {kind} holds no such file"
    kinds = {
        "EntryNotFoundError": no_file, "RemoteEntryNotFoundError": no_file, "GatedRepoError": "it needs a login",
        "RepositoryNotFoundError": f"no such {kind}, or it needs a login", "HFValidationError": "no name of the Hub",
    }  # fmt: skip
    chain, seen = error, []
    while chain is not None and len(seen) < 8:
        seen.append(type(chain).__name__)
        chain = chain.__cause__ or chain.__context__
    for name in seen:
        if name in ("LocalEntryNotFoundError", "OfflineModeIsEnabled") or "Connect" in name or "Timeout" in name:
            return "the Hub cannot be reached, and no copy lies in the cache"
    return next((kinds[name] for name in seen if name in kinds), " ".join(f"{seen[0]}: {error}".split())[:120])
