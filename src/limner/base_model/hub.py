"""The Hub's refusals, in words: what was asked for, what came back, what to do."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from limner.config.schema import ModelSettings
from limner.errors import HubError, LimnerError
from limner.storage import atomic


class SilentBar(tqdm):  # type: ignore[type-arg]
    """No progress bar: for files of a few kilobytes."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(
            *arguments, **{k: v for k, v in settings.items() if k != "name"} | {"disable": True}
        )


def fetch_files(
    model: ModelSettings, revision: str | None, patterns: list[str], bar: type[tqdm] = SilentBar
) -> Path:  # type: ignore[type-arg]
    """The snapshot folder of one commit, with the files that match; its name is the commit."""
    import huggingface_hub

    with (
        hub_errors(model.base, revision),
        atomic.disk_errors(Path(model.cache_dir or Path.home())),
    ):
        settings: dict[str, Any] = {
            "cache_dir": model.cache_dir,
            "endpoint": endpoint(),
            "tqdm_class": bar,
        }
        return Path(
            huggingface_hub.snapshot_download(
                model.base, revision=revision, allow_patterns=patterns, **settings
            )
        )


def list_repository_files(model: ModelSettings, folder: Path) -> list[str]:
    """The names of all files of a snapshot's commit: of those that are cached, where the Hub cannot
    be asked."""
    import huggingface_hub

    try:
        found = (
            huggingface_hub.HfApi(endpoint=endpoint())
            .model_info(model.base, revision=folder.name)
            .siblings
        )
        return [file.rfilename for file in found or []]
    except Exception:  # whatever it was: the fetch that follows says so, unless the cache has all
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def endpoint() -> str | None:
    """Where the Hub is, if not at its usual address; read when needed, not at import."""
    return os.environ.get("HF_ENDPOINT") or None


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None = None, then: str = "") -> Iterator[None]:
    """Turn what the Hub library raises into a ``HubError`` about ``repo``; ``then`` is said
    last."""
    try:
        yield
    except LimnerError:
        raise
    except Exception as error:
        causes = list(causes_of(error))
        if not any(is_hub_error(cause) for cause in causes):
            raise
        raise HubError(f"{explain(causes, repo, revision)}{then and ' '}{then}") from error


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it was raised from, however deep."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_hub_error(error: BaseException) -> bool:
    """Whether the network or the Hub's libraries made it; they also raise OSError without a
    number."""
    ours = type(error).__module__.startswith(("huggingface_hub", "httpx", "requests", "datasets"))
    return (
        ours
        or isinstance(error, ConnectionError | TimeoutError)
        or (isinstance(error, OSError) and error.errno is None)
    )


def explain(causes: list[BaseException], repo: str, revision: str | None = None) -> str:
    """One sentence or two about what the Hub said, and what can be done."""
    names = {cls.__name__ for c in causes for cls in type(c).__mro__}
    status = next(
        (r.status_code for c in causes if (r := getattr(c, "response", None)) is not None), None
    )
    login = "log in (`hf auth login`) or set HF_TOKEN"
    if "GatedRepoError" in names:
        return f"{repo}: access is gated. Accept its terms on its page on the Hub, then {login}."
    if "RevisionNotFoundError" in names:
        return (
            f"{repo}: there is no revision {revision or 'main'}. Look up its branches and "
            "commits on the Hub, or leave the revision out."
        )
    if "LocalTokenNotFoundError" in names:
        return f"{repo}: no token was found; {login}."
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"} or status in (401, 404):
        seen = f" ({status})" if status else ""
        return (
            f"{repo}: the Hub has no such repository, or it is private, or the token is not "
            f"valid{seen}. Check the spelling; if it is private, {login}."
        )
    if status == 403:
        return (
            f"{repo}: the token does not allow this (403). Use one with the right permissions: "
            f"{login}."
        )
    if status == 429:
        return (
            f"{repo}: the Hub asks to slow down (429). Wait some minutes and run the same "
            f"command again; to {login} raises the limit."
        )
    if status is not None:
        return f"{repo}: the Hub answered with an error ({status}). Try again later."
    if names & {
        "TransportError",
        "RequestException",
        "ConnectionError",
        "TimeoutError",
        "LocalEntryNotFoundError",
    }:
        where = endpoint() or "https://huggingface.co"
        return (
            f"{repo}: the Hub cannot be reached at {where}, and the local cache does not have "
            "all that is needed. Check the connection, or give a local folder."
        )
    text = str(causes[0]).strip()
    return f"{repo}: {text.splitlines()[0] if text else type(causes[0]).__name__}. Try again."
