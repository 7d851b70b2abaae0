"""Lists in pages, by the same words everywhere: `limit` and `after` in, `items` and `next` out.

`next` is the `after` of the following page, and null on the last; what is in it is the server's affair. Items
that come or go between two pages shift nothing: a page begins behind the last item of the one before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from agent_core.errors import MalformedError
from release_server.api.fleet_schemas import Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

MOST = 1000
LONGEST = 19
"""Digits of the largest number that is read."""
LARGEST, LARGEST_ID = 2**63 - 1, 2**31 - 1
"""What PostgreSQL takes to compare with a column of eight bytes, and of four, as those of ids are."""


class PageQuery(Shape):
    """Which part of a list: at most `limit` items, behind the one that `after` stands for."""

    limit: int = Field(MOST, ge=1, le=MOST)
    after: str | None = Field(None, max_length=256)

    @property
    def number(self) -> int | None:
        """`after` where items are known by their number.

        Raises:
            MalformedError: it is none.
        """
        return None if self.after is None else number_of(self.after)

    @property
    def place(self) -> tuple[int, str] | None:
        """`after` where items are known by the number of what they belong to, and a word.

        Raises:
            MalformedError: it is not of that form.
        """
        if self.after is None:
            return None
        owner, _, word = self.after.partition(".")
        return number_of(owner), word


def number_of(text: str, most: int = LARGEST_ID) -> int:
    """A number out of a cursor.

    Raises:
        MalformedError: it is none, or above `most`.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= LONGEST and int(text) <= most):
        raise MalformedError("after cannot be used", why="it is not the `next` of a page of this list")
    return int(text)


def page(
    query: PageQuery,
    fetch: Callable[[int], Sequence[T]],
    render: Callable[[T], Any],
    cursor: Callable[[T], object],
    fits: Callable[[T], bool] | None = None,
) -> dict[str, Any]:
    """One page.

    Args:
        fetch: the first so many items behind `after`, in the list's order.
        cursor: what stands for an item in `next`.
        fits: thins the page out afterwards, so that it may be short or empty and have a next one.
    """
    found = fetch(query.limit + 1)
    here = found[: query.limit]
    following = str(cursor(here[-1])) if len(found) > len(here) else None
    return {"items": [render(item) for item in here if fits is None or fits(item)], "next": following}
