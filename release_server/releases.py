"""Products and their releases, as the verified targets metadata lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import selectinload

from agent_core.errors import ConflictError, MalformedError, NotFoundError
from agent_core.wire import NAME
from release_server import audit
from release_server.models import Agent, Cohort, CohortStatus, Product, Release, Rollout, RolloutStatus

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy.orm import Session


def find_product(session: Session, name: str) -> Product:
    """The product of that name.

    Raises:
        NotFoundError: there is none.
    """
    product = session.scalar(select(Product).where(Product.name == name))
    if product is None:
        raise NotFoundError(f"there is no product {name}", then="release push makes it, or POST /products")
    return product


def list_products(session: Session, *, limit: int | None = None, after: str = "") -> Sequence[Product]:
    """Products by name, at most `limit`, those that come after `after`."""
    query = select(Product).where(Product.name > after).order_by(Product.name)
    return session.scalars(query.limit(limit)).all()


def make_product(session: Session, name: str, now: datetime, actor: str) -> Product:
    """Make a product before its first release, so that cohorts can be set up.

    Raises:
        ConflictError: it exists.
        MalformedError: the name cannot be one.
    """
    if not NAME.fullmatch(name):
        raise MalformedError(f"{name[:80]!r} cannot name a product", why=f"it must fit {NAME.pattern}")
    if session.scalar(select(Product.id).where(Product.name == name)) is not None:
        raise ConflictError(f"product {name} exists")
    return ensure_product(session, name, now, actor)


def ensure_product(session: Session, name: str, now: datetime, actor: str) -> Product:
    """The product of that name, made when there is none."""
    product = session.scalar(select(Product).where(Product.name == name))
    if product is None:
        product = Product(name=name, created_at=now)
        session.add(product)
        session.flush()
        audit.record(session, now, actor, "product.create", name)
    return product


def find_release(session: Session, product: Product, version: str) -> Release | None:
    return session.scalar(select(Release).where(Release.product_id == product.id, Release.version == version))


def get_release(session: Session, product: str, version: str) -> Release:
    """One release with its bundles.

    Raises:
        NotFoundError: no such product or version.
    """
    owner = find_product(session, product)
    release = session.scalar(
        select(Release)
        .options(selectinload(Release.bundles), selectinload(Release.product))
        .where(Release.product_id == owner.id, Release.version == version)
    )
    if release is None:
        raise NotFoundError(f"{product} has no release {version}", then=f"release list --product {product}")
    return release


def list_releases(
    session: Session,
    product: str | None = None,
    *,
    yanked: bool | None = None,
    limit: int | None = None,
    after: tuple[int, int] | None = None,
) -> Sequence[Release]:
    """Releases with their bundles, the newest of each product first; of all products when none is named.

    Args:
        after: product and seq of the release that they come after.
    """
    query = (
        select(Release)
        .options(selectinload(Release.bundles), selectinload(Release.product))
        .order_by(Release.product_id, Release.seq.desc())
    )
    if product is not None:
        query = query.where(Release.product_id == find_product(session, product).id)
    if yanked is not None:
        query = query.where(Release.yanked_at.is_not(None) if yanked else Release.yanked_at.is_(None))
    if after is not None:
        owner, seq = after
        older = and_(Release.product_id == owner, Release.seq < seq)
        query = query.where(or_(Release.product_id > owner, older))
    return session.scalars(query.limit(limit)).all()


# --- yanking ---------------------------------------------------------------------------------------------


def refuse_yanked(release: Release) -> None:
    """Raise ConflictError (`yanked`) when the release is not to be offered."""
    if release.yanked_at is not None:
        raise ConflictError(
            f"{release.version} was yanked",
            why=release.yank_reason,
            then=f"choose another version, or release yank {release.version} --undo",
            reason="yanked",
        )


@dataclass(frozen=True)
class Reach:
    """Who has to do with a release now.

    Attributes:
        agents: how many run it.
        cohorts: whose base it is, or that are pinned to it.
        rollouts: those of it that are not over.
    """

    agents: int
    cohorts: tuple[str, ...]
    rollouts: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        rollouts = [f"r-{number}" for number in self.rollouts]
        return {"agents": self.agents, "cohorts": list(self.cohorts), "rollouts": rollouts}


def reach(session: Session, release: Release) -> Reach:
    """Who has to do with this release now."""
    agents = session.scalar(
        select(func.count(Agent.id)).where(
            Agent.product_id == release.product_id,
            Agent.version == release.version,
            Agent.retired_at.is_(None),
        )
    )
    cohorts = session.scalars(
        select(Cohort.name)
        .join(CohortStatus, CohortStatus.cohort_id == Cohort.id)
        .where(
            Cohort.product_id == release.product_id,
            Cohort.deleted_at.is_(None),
            CohortStatus.base == release.version,
        )
        .order_by(Cohort.name)
    )
    rollouts = session.scalars(
        select(Rollout.id)
        .join(RolloutStatus, RolloutStatus.rollout_id == Rollout.id)
        .where(Rollout.release_id == release.id, RolloutStatus.finished_at.is_(None))
        .order_by(Rollout.id)
    )
    return Reach(agents or 0, tuple(cohorts), tuple(rollouts))
