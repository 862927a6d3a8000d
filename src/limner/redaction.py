"""Tokens and passwords are in nothing that is written: no file, no tracker, no message."""

import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO
from urllib.parse import urlsplit

from limner.errors import DiskError

# Whole words: MAX_TOKENS and TOKENIZER_NAME are no secrets.
SECRET_KEY = re.compile(r"(?<![A-Z0-9])(token|secret|password|api_?key)(?![A-Z0-9])", re.IGNORECASE)
SECRET_TEXT = re.compile(
    r"hf_[A-Za-z0-9]{20,}|hf_(?:oauth|jwt)_[\w.-]{20,}|api_org_[A-Za-z0-9]{20,}"
    r"|wandb_v1_[A-Za-z0-9_]{20,}"
    # GitHub, GitLab, OpenAI, Google.
    r"|gh[opsru]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|\bsk-[A-Za-z0-9][\w-]{30,}|AIza[\w-]{35}"
    r"|(?<=\bBearer )[\w.~+/-]{20,}=*"
)
# Each begins with what stays. A parameter ``key`` may be anything: of it only what is long counts.
SECRETS_OF_URLS = (
    re.compile(
        r"([?&#;](?:[\w.-]*[_.-]|access|auth|client)?"
        r"(?:token|secret|password|passwd|pwd|signature|sig|api[_-]?key)=)[^\s&#\"']+",
        re.IGNORECASE,
    ),
    re.compile(r"([?&#;](?:[\w.-]*[_.-])?key=)[^\s&#\"']{16,}", re.IGNORECASE),
    # A user with letters and digits, too long for a name, is a token.
    re.compile(r"(://)(?=[\w~.-]*\d)(?=[\w~.-]*[A-Za-z])[\w~.-]{20,}(?=(?::[^\s/]*)?@)"),
    re.compile(r"(://[^\s/@:]*:)[^\s/]+(?=@)"),
    # A password with a slash or with spaces, unless it may be a port and what follows it.
    re.compile(
        r"(://[^\s/@:\[]*:)(?!\d{1,5}(?:[/?#]|\W*(?:\s|$)))"
        r"[^\s/@:\[](?:[^\s\"'<>]*|[^\s@\"'<>]*(?: [^\s@\"'<>]+){1,2})(?=@[\w\[])"
    ),
)
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY")
# Variables whose name has such a word, and that say where a secret lies.
PLACES = ("PATH", "DIR", "FILE")
HIDDEN = "[redacted]"
NO_READER = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal
SHORTEST = 8  # characters; a shorter secret could be part of any word


def redact(value: Any, *, environment: bool = True) -> Any:
    """Return the same plain value without secrets.

    A secret is recognised by the name of its key, by its form, or because the environment holds it.

    Args:
        environment: False for what is read back: a name in it may be as a variable's value, and
            must not depend on who reads it.
    """
    again = functools.partial(redact, environment=environment)
    if isinstance(value, Mapping):
        return {
            again(key): HIDDEN if is_secret(key, item) else again(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [again(item) for item in value]
    return redact_text(value, environment=environment) if isinstance(value, str) else value


def is_secret(key: object, value: object) -> bool:
    """Return whether a key's name promises a secret, and its value may be one."""
    return bool(SECRET_KEY.search(str(key))) and value not in (None, "", True, False)


def redact_text(text: str, *, environment: bool = True) -> str:
    """Return a text without the tokens and passwords that it contains; see ``redact``."""
    for secret in list_secrets() if environment else ():
        if text == secret:
            text = HIDDEN
        elif len(secret) >= SHORTEST:
            text = text.replace(secret, HIDDEN)
    text = SECRET_TEXT.sub(HIDDEN, text)
    for pattern in SECRETS_OF_URLS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def list_secrets() -> list[str]:
    """Return the secrets that the environment holds, the longest first."""
    secrets = {os.environ.get(name, "").strip() for name in SECRET_VARIABLES}
    for name, value in os.environ.items():
        if SECRET_KEY.search(name) and not name.endswith(PLACES) and len(value) >= SHORTEST:
            secrets.add(value.strip())
    with contextlib.suppress(ValueError):
        secrets.add(urlsplit(os.environ.get("HF_ENDPOINT", "")).password or "")
    return sorted(secrets - {""}, key=len, reverse=True)


class RedactedStream:
    """A text stream that writes no secret, and that nobody has to read.

    Where a terminal was closed, or the program at the other end of a pipe has ended, what is
    written is lost, and nothing else is.

    Args:
        is_essential: whether any other failure, as of a full disk, is an error.
    """

    def __init__(self, stream: TextIO, is_essential: bool = False):
        self.stream, self.is_essential = stream, is_essential

    def write(self, text: str) -> int:
        """Write a text without its secrets."""
        with self.losing_text():
            self.stream.write(redact_text(text))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self.losing_text():
            self.stream.flush()

    @contextlib.contextmanager
    def losing_text(self) -> Iterator[None]:
        """Lose what cannot be written inside, and all after it.

        Raises:
            DiskError: where the stream is essential, and has a reader.
        """
        try:
            yield
        except OSError as error:
            # Else Python tries again when the process ends, and changes its exit code.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if self.is_essential and error.errno not in NO_READER:
                raise DiskError(f"the output could not be written: {error.strerror}") from error

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_descriptors() -> None:
    """Open standard input, output and error that were closed, on nothing.

    Else the next file that is opened would take their place, and what libraries say.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


@contextlib.contextmanager
def redacted_output() -> Iterator[None]:
    """While the block lasts, no secret is written to standard output and standard error."""
    open_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        stream
        if isinstance(stream, RedactedStream)
        # Python has None for one that was closed when it began.
        else RedactedStream(stream or open(os.devnull, "w"), is_output)  # noqa: SIM115
        for stream, is_output in zip(before, (True, False), strict=True)
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
