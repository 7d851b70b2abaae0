"""Shapes that several routes share: a row's number in a path, and a time that may not be there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from agent_core.clock import iso

if TYPE_CHECKING:
    from datetime import datetime


class NumberPath(BaseModel):
    """The number of a row; larger ones are in no database's reach."""

    id: int = Field(ge=1, lt=2**31)


def when(moment: datetime | None) -> str | None:
    """A time as the API says it, null for none."""
    return None if moment is None else iso(moment)
