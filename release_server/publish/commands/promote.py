"""`release promote`: what one cohort has completed goes to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from agent_core import console
from agent_core.errors import ConflictError, NotFoundError
from release_server.publish.commands.operate import client, product, reason_option
from release_server.publish.commands.rollout import gate_options, plan_body, tell_begun
from release_server.publish.words import given

if TYPE_CHECKING:
    from collections.abc import Mapping

PROVEN = "completed"


@click.command("promote")
@click.argument("version", required=False)
@click.option("--to", "cohort", required=True, metavar="COHORT", help="The cohort that is to have it next.")
@click.option(
    "--from", "origin", metavar="COHORT", help="The cohort that has completed it; any when left out."
)
@gate_options
@click.option("--supersede", is_flag=True, help="Take the place of a rollout that is going on there.")
@click.option("--draft", is_flag=True, help="Keep it ready; it begins by: release rollout resume ID.")
@reason_option()
def promote(
    version: str | None,
    *,
    cohort: str,
    origin: str | None,
    supersede: bool,
    draft: bool,
    reason: str | None,
    **plan: Any,
) -> None:
    """Start a rollout of VERSION to a cohort, because a rollout of it has completed in another one.

    Without VERSION it is the one that --from has settled on. What no cohort has completed, or what went back
    there since, is refused: `release rollout start` asks for no such proof.
    """
    if version is None and origin is None:
        raise click.UsageError("say VERSION, or --from COHORT")
    proof = find_proof(version, cohort, origin)
    version = str(proof["version"])
    because = reason or f"promoted from {proof['cohort']} ({proof['name']})"
    body = plan_body(version, cohort=cohort, **plan)
    body |= given(reason=because, supersede=supersede or None, draft=draft or None)
    console.say(f"{proof['name']} has completed {version} in {proof['cohort']}")
    tell_begun(client().post("/rollouts", body))


def find_proof(version: str | None, cohort: str, origin: str | None) -> Mapping[str, Any]:
    """The newest rollout by which another cohort has settled on the version.

    Raises:
        NotFoundError: the cohort it is to come from is not there.
        ConflictError: `not-completed`; there is none.
    """
    settled = {entry["name"]: entry["base"] for entry in client().items("/cohorts", product=product())}
    if origin is not None and origin not in settled:
        raise NotFoundError(f"{product()} has no cohort {origin}", then="release cohort list")
    wanted = version or settled[str(origin)]
    for rollout in client().items("/rollouts", product=product(), limit=1000, **given(cohort=origin)):
        here = rollout["cohort"] != cohort and rollout["version"] == wanted
        if here and rollout["state"] == PROVEN and settled.get(rollout["cohort"]) == wanted:
            return rollout
    where = f"in {origin}" if origin else f"in a cohort other than {cohort}"
    raise ConflictError(
        f"{wanted or 'nothing'} cannot be promoted to {cohort}",
        why=f"no rollout of it has completed {where} and still holds",
        then=f"release rollout start {wanted or 'VERSION'} --cohort {cohort}, which asks for no proof",
        reason="not-completed",
    )
