"""Whom a query would put into a cohort, and how many of them could take a release; changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlalchemy import select

from agent_core.errors import NotFoundError
from release_server import agents, cohorts, membership, presence, releases
from release_server.membership import Candidate, choose, fixed, in_pages, movable
from release_server.models import Bundle
from release_server.queries import parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.membership import Member
    from release_server.models import Cohort, CohortSpec, Product

NAMED = 1000
"""How many agents are named in each list; the counts are always whole."""


@dataclass
class Group:
    """Agents of one kind: all are counted, the first are named."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, agent_id: str) -> None:
        self.count += 1
        if len(self.names) < NAMED:
            self.names.append(agent_id)


@dataclass
class Preview:
    """Who would be in a cohort, who would come and go for it, and how they stand to `version`.

    An agent may be in several of `held`, `silent` and `no_bundle`; it is in `ready` when in none.
    """

    match: str
    version: str | None
    inside: Group = field(default_factory=Group)
    joins: Group = field(default_factory=Group)
    leaves: Group = field(default_factory=Group)
    ready: Group = field(default_factory=Group)
    held: Group = field(default_factory=Group)
    silent: Group = field(default_factory=Group)
    no_bundle: Group = field(default_factory=Group)


def preview(
    session: Session,
    now: datetime,
    product: str,
    name: str,
    match: str | None = None,
    *,
    priority: int | None = None,
    version: str | None = None,
) -> Preview:
    """Say who would be in the cohort if it matched `match` (None: as it does now).

    Args:
        name: one that is not there yet is tried as if it were made; that needs a `match`.
        priority: to try as well; None: as it is.
        version: the release that `ready` is about; None: the one that the cohort is led to.

    Raises:
        UsageError: the match cannot be read.
        NotFoundError: no such product, release, or cohort while no match is given.
    """
    owner = releases.find_product(session, product)
    cohort, spec = _known(session, owner, name, match)
    tried = spec.match if match is None and spec else (match or "").strip()
    wanted = Candidate(cohort.id if cohort else 0, name, _priority(spec, priority), parse(tried))
    others = [
        entry for entry in membership.candidates(session, owner.id) if entry.cohort_id != wanted.cohort_id
    ]
    found = Preview(tried, version or _led_to(session, cohort))
    platforms = _platforms(session, owner, found.version)
    silent_before = agents.silent_before(now, spec, presence.Ear(session, now))
    for page in in_pages(session, fixed(wanted.cohort_id)):
        _sort_in(found, page, silent_before, platforms)
    for page in in_pages(session, movable(owner.id)):
        inside = [member for member in page if choose([*others, wanted], member.facts) == wanted.cohort_id]
        _compare(found, page, inside, wanted.cohort_id)
        _sort_in(found, inside, silent_before, platforms)
    found.inside.names.sort()
    return found


def _known(
    session: Session, owner: Product, name: str, match: str | None
) -> tuple[Cohort | None, CohortSpec | None]:
    try:
        cohort = cohorts.find(session, owner.name, name)
    except NotFoundError:
        if match is None:
            raise
        return None, None
    return cohort, cohorts.newest_spec(session, cohort.id)


def _priority(spec: CohortSpec | None, priority: int | None) -> int:
    if priority is not None:
        return priority
    return spec.priority if spec else 0


def _led_to(session: Session, cohort: Cohort | None) -> str | None:
    told = None if cohort is None else cohorts.status_of(session, cohort.id).directive
    return (told or {}).get("release") or (told or {}).get("base")


def _platforms(session: Session, owner: Product, version: str | None) -> Sequence[str] | None:
    """What a release has bundles for; None when there is no release to look at."""
    if version is None:
        return None
    release = releases.find_release(session, owner, version)
    if release is None:
        raise NotFoundError(f"{owner.name} has no release {version}", then="release list")
    return session.scalars(select(Bundle.platform).where(Bundle.release_id == release.id)).all()


def _compare(found: Preview, page: Iterable[Member], inside: Iterable[Member], cohort_id: int) -> None:
    fits = {member.id for member in inside}
    for member in page:
        was = member.cohort_id == cohort_id
        if member.id in fits and not was:
            found.joins.add(member.id)
        elif was and member.id not in fits:
            found.leaves.add(member.id)


def _sort_in(
    found: Preview,
    members: Iterable[Member],
    silent_before: datetime,
    platforms: Sequence[str] | None,
) -> None:
    for member in members:
        found.inside.add(member.id)
        fits = platforms is None or any(agents.runs_on(entry, member.platform) for entry in platforms)
        against = (
            (found.held, member.held),
            (found.silent, member.seen_at < silent_before),
            (found.no_bundle, not fits),
        )
        for group in [group for group, stands in against if stands] or [found.ready]:
            group.add(member.id)
