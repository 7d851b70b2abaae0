"""The role table: who signs what, how long it holds, and when it is signed again (design section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

ROOT = "root"
TARGETS = "targets"
COHORTS = "cohorts"
SNAPSHOT = "snapshot"
TIMESTAMP = "timestamp"

COHORT_PATHS = ("cohorts/*/*",)
"""What the delegated role may list: directives, and nothing that could run."""
RESERVED_PATHS = ("bundles", "deltas", "policy")
"""First path segments that only top-level targets may list; no delegation may match below them."""


@dataclass(frozen=True)
class RoleRule:
    """How one role is kept.

    Attributes:
        online: its key is on the server; the offline ones are with people.
        expires: how long a new version holds.
        resign_before: a new version is due when no more than this is left. For targets, which people sign
            with every push, it is when the tools begin to remind them.
        threshold: how many keys sign unless the ceremony says otherwise.
    """

    name: str
    online: bool
    expires: timedelta
    resign_before: timedelta
    threshold: int = 1

    def expiry(self, now: datetime) -> datetime:
        """When a version signed now expires, in whole seconds as TUF writes times."""
        return now.replace(microsecond=0) + self.expires

    def latest(self, now: datetime) -> datetime:
        """The latest expiry that is taken for one signed lately; clocks may differ by a day."""
        return self.expiry(now) + timedelta(days=1)

    def is_due(self, expires: datetime, now: datetime) -> bool:
        return expires - now <= self.resign_before

    def is_late(self, expires: datetime, now: datetime) -> bool:
        """Whether somebody has to act.

        The server signs what is due at once, so half of that time later it has failed to. People are reminded
        from the day it is due.
        """
        return expires - now <= (self.resign_before / 2 if self.online else self.resign_before)


ROLES: dict[str, RoleRule] = {
    rule.name: rule
    for rule in (
        RoleRule(ROOT, online=False, expires=timedelta(days=365), resign_before=timedelta(days=60)),
        RoleRule(TARGETS, online=False, expires=timedelta(days=60), resign_before=timedelta(days=14)),
        RoleRule(COHORTS, online=True, expires=timedelta(days=14), resign_before=timedelta(days=7)),
        RoleRule(SNAPSHOT, online=True, expires=timedelta(days=14), resign_before=timedelta(days=7)),
        # Holds a day, renewed every six hours: three renewals may fail before an agent sees an expired one.
        RoleRule(TIMESTAMP, online=True, expires=timedelta(hours=24), resign_before=timedelta(hours=18)),
    )
}

ONLINE_ROLES = tuple(name for name, rule in ROLES.items() if rule.online)
OFFLINE_ROLES = tuple(name for name, rule in ROLES.items() if not rule.online)
