"""Push a result to the Hub."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from limner.base_model.hub import endpoint, hub_errors
from limner.errors import HubError, InputError, IntegrityError, say_count
from limner.json_types import parse_json
from limner.storage import atomic
from limner.storage.run_folder import CARD_FILE, GRID_FILE, RunFolder
from limner.training.result import is_result_whole, read_result

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def check_push(repo_id: str, private: bool = False) -> str:
    """Check before training that the result can be pushed, and return the repository's full name.

    A repository that does not exist is created.

    Raises:
        HubError: when there is no token, or it may not write to this repository.
    """
    with hub_errors(
        repo_id, then="Nothing was trained yet; leave export.hub out to train without pushing."
    ):
        api, token = connect(repo_id)
        name = create_repository(api, repo_id, private, token)
        api.auth_check(name, token=token, write=True)
    return name


def push_result(
    run: Path, repo_id: str, private: bool = False, report: Callable[[str], None] = print
) -> str:
    """Upload the result, its card and its pictures, and return the address of the repository.

    Raises:
        IntegrityError: when there is no whole result to push.
        HubError: when the Hub refuses or cannot be reached; the result stays as it is.
    """
    from huggingface_hub import CommitOperationAdd

    result = read_result(run)
    if not is_result_whole(run):
        raise IntegrityError(
            f"{run}: a file of the result was changed or is missing. Run the training command "
            "again: a finished run only writes its result anew."
        )
    extras = [name for name in (CARD_FILE, GRID_FILE) if (run / name).is_file()]
    names = [*result["files"], *extras]
    command = f"limner export {shlex.quote(str(run))} --push {shlex.quote(repo_id)}"
    with hub_errors(repo_id, then=f"The result in {run} is complete. To push it again: {command}"):
        api, token = connect(repo_id)
        repository = create_repository(api, repo_id, private, token)
        files = say_count(len(names), "file", "files")
        report(f"pushing {files} to {repository}: {', '.join(names)}")
        api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=run / name) for name in names],
            commit_message=f"Result of step {result['step']}",
            token=token,
        )
    pushed = {"repository": repository, "digest": result["digest"]}
    atomic.write_text(RunFolder(run).pushed, json.dumps(pushed))
    return f"{endpoint() or 'https://huggingface.co'}/{repository}"


def is_pushed(run: Path, repo_id: str) -> bool:
    """Return whether this result has been pushed to this repository."""
    try:
        pushed = parse_json(RunFolder(run).pushed.read_text(encoding="utf-8"))
        return bool(pushed == {"repository": repo_id, "digest": read_result(run)["digest"]})
    except (OSError, ValueError, IntegrityError):
        return False


def connect(repo_id: str) -> "tuple[HfApi, str]":
    """Return the Hub's interface, and the token of the environment or of the login."""
    import huggingface_hub

    if re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", repo_id) is None:
        raise InputError(
            f"export.hub: {repo_id!r} is no name of a repository; write owner/name, or name for "
            "one of your own."
        )
    token = huggingface_hub.get_token()
    if token is None:
        raise HubError(
            f"{repo_id}: no token was found, one is needed to push. Log in (`hf auth login`) or "
            "set HF_TOKEN."
        )
    return huggingface_hub.HfApi(endpoint=endpoint()), token


def create_repository(api: "HfApi", repo_id: str, private: bool, token: str) -> str:
    """Create the repository if there is none, and return its full name."""
    user = api.whoami(token=token)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"{repo_id}: the token may only read. Make one that may write, on the Hub's settings "
            "page, and set HF_TOKEN."
        )
    name = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    # None leaves the visibility to the settings of the owner's account.
    api.create_repo(name, private=private or None, exist_ok=True, token=token)
    return name
