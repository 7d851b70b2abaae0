"""Reads a secret from the file that somebody named, and never repeats the name of one that is not there.

What was named may be the secret itself, put where its file belongs; an error with it ends in a terminal's
history, in a pipeline's log, in a report to somebody else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_core.errors import MalformedError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path

MOST = 4096


def read(path: Path, what: str) -> str:
    """The text of a file that holds a secret.

    Args:
        what: what it holds, in words: `token`, `passphrase`.

    Raises:
        NotFoundError: `no-file`; it cannot be read.
        MalformedError: it is not text.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MOST)
    except OSError as error:
        raise NotFoundError(
            f"the file of the {what} cannot be read",
            why=f"{error.strerror}; its name is not repeated here, for it may be the {what} itself",
            then=f"name a file that holds the {what}; - is stdin",
            reason="no-file",
        ) from None
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise MalformedError(f"the {what} in {path} is not text") from None
