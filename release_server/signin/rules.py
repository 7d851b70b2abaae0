"""Who of a provider's people may do what here: the rules of `oidc.roles`, held against an ID token. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent_core.errors import NotAllowedError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ROLES = frozenset({"reader", "releaser", "operator", "admin"})
"""Not `enroller`: agents are enrolled with tokens, which can be limited and counted."""
FORM = re.compile(r"([a-z]+): ?([^\s=]{1,64})=(\S(?:.*\S)?)")
EMAIL = "email"
MOST_NAME = 128
MOST_SUBJECT = 255


@dataclass(frozen=True)
class Rule:
    """One line of `oidc.roles`, `operator: groups=fleet-operators`.

    Attributes:
        text: the line as it was written; a session remembers it, and ends where it is gone.
    """

    text: str
    role: str
    claim: str
    value: str

    @classmethod
    def read(cls, text: str) -> Rule:
        """Read one line.

        Raises:
            SettingsError: it has another form, or gives a role that a session cannot have.
        """
        found = FORM.fullmatch(text)
        if found is None or found[1] not in ROLES or len(text) > 512:
            raise SettingsError(
                "oidc.roles cannot be used",
                why=f"{text[:80]!r} is not ROLE: CLAIM=VALUE with a role of {', '.join(sorted(ROLES))}",
                then='write "operator: groups=fleet-operators" or "admin: email=ada@example.org"',
            )
        return cls(text, *found.groups())

    def admits(self, claims: Mapping[str, Any]) -> bool:
        """Whether the claim is the value, or a list with it; an address counts only when it is verified."""
        said = claims.get(self.claim)
        if self.claim == EMAIL:
            return is_verified(claims) and _folded(said) == self.value.casefold()
        return said == self.value if isinstance(said, str) else isinstance(said, list) and self.value in said


@dataclass(frozen=True)
class Identity:
    """Who signed in.

    Attributes:
        name: what the audit log calls this person, and tokens made for the same one begin with.
        subject: the provider's own name, which it never gives to another.
        rule: the first that admits; it gives the role.
    """

    name: str
    subject: str
    rule: Rule


def is_verified(claims: Mapping[str, Any]) -> bool:
    """Whether the provider says that it has verified the address: anybody may type one at some providers."""
    return claims.get("email_verified") is True


def _folded(said: object) -> str | None:
    return said.casefold() if isinstance(said, str) else None


def name_of(claims: Mapping[str, Any], claim: str) -> str:
    """What the person is called.

    Raises:
        NotAllowedError: `signin-name`; a name that may be somebody else's, or that cannot stand in a log.
    """
    name = claims.get(claim)
    said = isinstance(name, str) and (claim != EMAIL or is_verified(claims))
    # Behind a `/` stands what a token is for, so a name with one could pass for another person's token.
    if not isinstance(name, str) or not said or not _is_plain(name) or "/" in name:
        raise NotAllowedError(
            "you have no name here",
            why=f"the provider gives no {claim} that can be used"
            + (", or does not say that it is verified" if claim == EMAIL else ""),
            then="have the provider send that claim, or name another one in oidc.name_claim",
            reason="signin-name",
        )
    return name


def _is_plain(name: str) -> bool:
    return 0 < len(name) <= MOST_NAME and name.isprintable() and name == name.strip()


def admit(claims: Mapping[str, Any], rules: Iterable[Rule], name_claim: str) -> Identity:
    """Say who somebody is, and what he may do: the first rule that admits counts.

    Args:
        claims: of an ID token that was verified.

    Raises:
        NotAllowedError: `signin-name`, or `signin-unmapped`, when no rule admits.
    """
    name = name_of(claims, name_claim)
    for rule in rules:
        if rule.admits(claims):
            return Identity(name, str(claims["sub"]), rule)
    raise NotAllowedError(
        f"{name} may not sign in here",
        why="no line of oidc.roles names you or a group of yours",
        then="ask an admin of this server",
        reason="signin-unmapped",
    )
