"""Repositories of the hub that stand in the cache of this machine; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path


def cached_folder(repository: str, revision: str | None) -> Path | None:
    """Returns the folder of a repository in the cache; None where it is not there, or `huggingface_hub` is not.

    Args:
        repository: ``owner/name``.
        revision: A branch, a tag or a commit; the default branch where there is none.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None
