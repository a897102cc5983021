"""A model's files from the Hugging Face hub, or from its cache on this machine."""

from __future__ import annotations

from pathlib import Path

from albireo.errors import ModelError
from albireo.models.pretrained import weight_files

__all__ = ["download_model"]

_DESCRIPTIONS = (
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
# Older repositories hold pickled weights alone. The hub's own robot offers safetensors for most, as a pull request.
_CONVERTER = "SFconvertbot"


def download_model(repository: str, *, weights: bool, patience_seconds: float = 5.0) -> Path:
    """Return a folder with a model's configuration and tokenizer, and its weights if asked for.

    What is in the hub's cache is not fetched again, and serves when the hub cannot be reached. Pickled weights are
    never fetched.

    Args:
        repository: `owner/name`.
        weights: fetch the weights too, as safetensors.
        patience_seconds: how long the hub may be silent before it counts as out of reach.

    Raises:
        ModelError: the hub cannot be reached and the cache does not hold the model, or there is no such model, or it
            has no safetensors.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return _from_hub(repository, weights, patience_seconds)
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError(
            f"the model {repository} is on the hub, but its owner must let you in first: "
            "accept its terms there and run `hf auth login`, or give a local folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no model {repository} on the hub that you may read, and no folder of that name here"
        ) from error
    except Exception as error:
        if not _is_about_the_line(error):
            raise
        cached = _from_cache(repository, weights=weights)
        if cached is not None:
            return cached
        what = "refused" if isinstance(error, HfHubHTTPError) else "cannot be reached for"
        raise ModelError(
            f"the hub {what} the model {repository} ({_first_line(error)}): "
            "use --init random with a named size, or give a local folder"
        ) from error


def _is_about_the_line(error: Exception) -> bool:
    """Whether the network failed. The client passes on errors of httpx or httpx2, by its version."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2")


def _from_hub(repository: str, weights: bool, patience_seconds: float) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    # Asked with a time limit first: the download itself has none.
    info = HfApi().model_info(repository, timeout=patience_seconds)
    revision: str | None = info.sha
    patterns = [*_DESCRIPTIONS]
    if weights:
        patterns += _WEIGHTS
        if not {sibling.rfilename for sibling in info.siblings or ()} & set(_WEIGHTS):
            revision = _converted_revision(repository)
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def _converted_revision(repository: str) -> str:
    """Return the robot's newest open pull request that adds safetensors."""
    from huggingface_hub import HfApi

    requests = HfApi().get_repo_discussions(repository, author=_CONVERTER, discussion_type="pull_request")
    numbers = [r.num for r in requests if r.status == "open" and r.author == _CONVERTER and "safetensors" in r.title]
    if not numbers:
        raise ModelError(
            f"the model {repository} has pickled weights only, which can run any code when they are read: convert them "
            "at https://huggingface.co/spaces/safetensors/convert, or give a folder written by save_pretrained"
        )
    return f"refs/pr/{max(numbers)}"


def _from_cache(repository: str, *, weights: bool) -> Path | None:
    """Return the newest snapshot in the hub's cache that is whole, `main` before others."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return None
    revisions = [
        revision
        for cached in repositories
        if cached.repo_type == "model" and cached.repo_id == repository
        for revision in cached.revisions
    ]
    revisions.sort(key=lambda revision: ("main" in revision.refs, revision.last_modified), reverse=True)
    for revision in revisions:
        if (revision.snapshot_path / "config.json").is_file() and (not weights or _has_weights(revision.snapshot_path)):
            return revision.snapshot_path
    return None


def _has_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(folder))
    except ModelError:
        return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
