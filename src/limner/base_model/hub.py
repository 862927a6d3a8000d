"""Fetch files from the Hub, and say in words what it refuses."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from limner.config.schema import ModelSettings
from limner.errors import HubError, InputError, LimnerError
from limner.storage import atomic

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


# How the name of a file ends that somebody may give in place of a folder or repository.
FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".msgpack")


def check_hub_name(name: str, setting: str, wanted: str) -> None:
    """Refuse what is neither here nor a name on the Hub, so that the Hub is not asked for it.

    A name of two words whose first is a folder here is taken for a mistyped path: a repository of
    that name would be somebody else's weights.

    Args:
        name: what is no file or folder here.
        setting: the setting that gave it.
        wanted: what it should be, e.g. ``a folder in the diffusers layout``.

    Raises:
        InputError: saying which of the two it is taken for.
    """
    is_file = name.endswith(FILE_SUFFIXES)
    if is_file or not HUB_NAME.fullmatch(name):
        raise InputError(
            f"{setting}: {name}: no such {'file' if is_file else 'folder'}, and not a name on the "
            f"Hub (owner/name). Give {wanted} or such a name."
        )
    owner = name.split("/")[0]
    if Path(owner).is_dir():
        raise InputError(
            f"{setting}: {name}: no such folder, though there is {Path(owner).absolute()}. Give "
            f"{wanted}. If the Hub's repository of that name is meant, run the command where no "
            f"folder is called {owner}."
        )


class SilentBar(tqdm):  # type: ignore[type-arg]
    """No progress bar: for files of a few kilobytes."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        # The Hub library gives its bars a name, which tqdm's own do not take.
        settings.pop("name", None)
        super().__init__(*arguments, **settings | {"disable": True})


def fetch_files(
    model: ModelSettings,
    revision: str | None,
    patterns: list[str],
    bar: "type[tqdm[object]]" = SilentBar,
) -> Path:
    """Fetch the files of one commit that match; return their folder, named by the commit.

    Raises:
        HubError: when the Hub refuses or cannot be reached.
        DiskError: when there is no room.
    """
    import huggingface_hub

    cache = Path(model.cache_dir or Path.home())
    with hub_errors(model.base, revision), atomic.disk_errors(cache):
        folder = huggingface_hub.snapshot_download(
            model.base,
            revision=revision,
            allow_patterns=patterns,
            cache_dir=model.cache_dir,
            endpoint=endpoint(),
            tqdm_class=bar,  # type: ignore[arg-type]
        )
        return Path(folder)


def list_repository_files(model: ModelSettings, folder: Path) -> list[str]:
    """List the files of a commit; only the cached ones where the Hub cannot be asked.

    Args:
        folder: of the commit, as ``fetch_files`` returns it.
    """
    import huggingface_hub

    try:
        hub = huggingface_hub.HfApi(endpoint=endpoint())
        files = hub.model_info(model.base, revision=folder.name).siblings
        return [file.rfilename for file in files or []]
    # Of any kind: the fetch that follows reports it, unless the cache has all that is needed.
    except Exception:
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def endpoint() -> str | None:
    """Return the Hub's address where the environment names one, which is read at each call."""
    return os.environ.get("HF_ENDPOINT") or None


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None = None, then: str = "") -> Iterator[None]:
    """Turn what the Hub library raises into a ``HubError``.

    Args:
        repo: the repository that the message names.
        then: the message's last sentence.
    """
    try:
        yield
    except LimnerError:
        raise
    except Exception as error:
        causes = list(iterate_causes(error))
        if not any(is_hub_error(cause) for cause in causes):
            raise
        message = explain(causes, repo, revision)
        raise HubError(f"{message} {then}" if then else message) from error


def iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that it was raised from, however deep."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_hub_error(error: BaseException) -> bool:
    """Return whether the network or one of the Hub's libraries raised an error."""
    if type(error).__module__.startswith(("huggingface_hub", "httpx", "requests", "datasets")):
        return True
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    # The system's own errors have a number; those that the libraries raise have none.
    return isinstance(error, OSError) and error.errno is None


LOGIN = "log in (`hf auth login`) or set HF_TOKEN"
UNREACHABLE = {
    "TransportError",
    "RequestException",
    "ConnectionError",
    "TimeoutError",
    "LocalEntryNotFoundError",
}


def explain(causes: list[BaseException], repo: str, revision: str | None = None) -> str:
    """Say in a sentence or two what the Hub answered, and what can be done."""
    names = {cls.__name__ for cause in causes for cls in type(cause).__mro__}
    status = find_status(causes)
    if "GatedRepoError" in names:
        return f"{repo}: access is gated. Accept its terms on its page on the Hub, then {LOGIN}."
    if "RevisionNotFoundError" in names:
        return (
            f"{repo}: there is no revision {revision or 'main'}. Look up its branches and "
            "commits on the Hub, or leave the revision out."
        )
    if "LocalTokenNotFoundError" in names:
        return f"{repo}: no token was found; {LOGIN}."
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"} or status in (401, 404):
        number = f" ({status})" if status else ""
        return (
            f"{repo}: the Hub has no such repository, or it is private, or the token is not "
            f"valid{number}. Check the spelling; if it is private, {LOGIN}."
        )
    if status is not None:
        return explain_status(status, repo)
    if names & UNREACHABLE:
        return (
            f"{repo}: the Hub cannot be reached at {endpoint() or 'https://huggingface.co'}, and "
            "the local cache does not have all that is needed. Check the connection, or give a "
            "local folder."
        )
    text = str(causes[0]).strip()
    return f"{repo}: {text.splitlines()[0] if text else type(causes[0]).__name__}. Try again."


def find_status(causes: list[BaseException]) -> int | None:
    """Return the HTTP status of the first error that has an answer of the Hub."""
    for cause in causes:
        response = getattr(cause, "response", None)
        if response is not None:
            return response.status_code
    return None


def explain_status(status: int, repo: str) -> str:
    """Say what an HTTP status means, and what can be done."""
    if status == 403:
        return (
            f"{repo}: the token does not allow this (403). Use one with the right permissions: "
            f"{LOGIN}."
        )
    if status == 429:
        return (
            f"{repo}: the Hub asks to slow down (429). Wait some minutes and run the same "
            f"command again; to {LOGIN} raises the limit."
        )
    return f"{repo}: the Hub answered with an error ({status}). Try again later."
