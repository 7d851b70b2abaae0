"""What must be so after any number of kills, read from the database, the files and the agents' own memory."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from sqlalchemy import select

from agent_core.wire import AttemptState, directive_path
from keys.roles import COHORTS, ONLINE_ROLES, SNAPSHOT, TIMESTAMP
from release_server import attempts, audit
from release_server.models import (
    Agent,
    AgentEvent,
    Attempt,
    AuditEntry,
    MetadataFile,
    Rollout,
    RolloutEvent,
    RolloutSpec,
)
from release_server.signing.log import verify
from tests.chaos.fleet import LIMIT
from tests.integration.world import PRODUCT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy.orm import Session

    from tests.chaos.fleet import Fleet

ONCE = ("completed", "rolled-back", "aborted")
"""Events of a rollout that cannot happen to it twice."""


class Proof:
    """Claims that were checked, and those that were wrong.

    Args:
        session: a read of the database, when all is quiet.
        fleet: what the agents did, and were told.
        cohort: theirs.
    """

    def __init__(self, session: Session, fleet: Fleet, cohort: str) -> None:
        self.session, self.fleet, self.cohort = session, fleet, cohort
        self.checked: list[str] = []
        self.wrong: list[str] = []

    def _claim(self, claim: str, wrong: list[str]) -> None:
        self.checked.append(claim)
        self.wrong += [f"{claim}: {one}" for one in wrong[:5]]

    def all(self, bad: str, metadata: Path, signer: Path) -> None:
        self.no_agent_was_answered_strangely()
        self.counters_equal_a_recount()
        self.every_transition_is_there_once()
        self.attempts_are_as_the_agents_know_them()
        self.nothing_of_a_rollout_happened_twice()
        self.nothing_was_asked_twice()
        self.a_halted_release_is_offered_to_nobody(bad)
        self.every_version_is_one_file(metadata)
        self.no_replica_ever_went_back()
        self.never_more_of_a_site_than_its_limit()
        self.the_logs_follow(signer)

    # --- agents --------------------------------------------------------------------------------------------

    def no_agent_was_answered_strangely(self) -> None:
        self._claim("no honest request was refused", self.fleet.strange)

    def every_transition_is_there_once(self) -> None:
        heard = defaultdict(list)
        query = select(AgentEvent.agent_id, AgentEvent.number, AgentEvent.state, AgentEvent.version)
        for agent_id, *what in self.session.execute(query.order_by(AgentEvent.agent_id, AgentEvent.number)):
            heard[agent_id].append(tuple(what))
        said = {one.id: [(t.number, str(t.state), t.version) for t in one.said] for one in self.fleet.agents}
        self._claim(
            f"each of the agents' {sum(map(len, said.values()))} transitions is in the database, once",
            [f"{agent}: {said[agent]} and {heard[agent]}" for agent in said if said[agent] != heard[agent]],
        )

    def attempts_are_as_the_agents_know_them(self) -> None:
        wrong = []
        rollouts = {rollout.salt: rollout for rollout in self.session.scalars(select(Rollout))}
        query = select(Attempt.agent_id, Attempt.rollout_id, Attempt.state)
        known = {(agent, rollout): state for agent, rollout, state in self.session.execute(query)}
        for agent in self.fleet.agents:
            for salt, rollout in rollouts.items():
                ended = [t for t in agent.said if t.salt == salt]
                wanted = _state(ended, rollout) if ended else None
                if known.get((agent.id, rollout.id)) != wanted:
                    wrong.append(
                        f"{agent.id} in r-{rollout.id}: {known.get((agent.id, rollout.id))}, {wanted}"
                    )
        self._claim("every attempt is in the state that its agent knows it to be in", wrong)

    def never_more_of_a_site_than_its_limit(self) -> None:
        most = self.fleet.most_at_work
        wrong = [f"{most} at once"] if most > LIMIT else []
        self._claim(f"never more than {LIMIT} of a site were between two versions ({most} at most)", wrong)

    # --- rollouts ------------------------------------------------------------------------------------------

    def counters_equal_a_recount(self) -> None:
        numbers = self.session.scalars(select(Rollout.id)).all()
        wrong = [
            f"r-{number}: {attempts.counters(self.session, number)}"
            for number in numbers
            if attempts.counters(self.session, number) != attempts.recount(self.session, number)
        ]
        self._claim(f"the counters of {len(numbers)} rollouts equal a recount", wrong)

    def nothing_of_a_rollout_happened_twice(self) -> None:
        seen = Counter(
            (event.rollout_id, event.event, event.stage)
            for event in self.session.scalars(select(RolloutEvent))
            if event.event.startswith("stage") or event.event in ONCE or event.event == "paused"
        )
        wrong = [
            f"r-{key[0]}: {key[1]} of stage {key[2]}: {count}" for key, count in seen.items() if count > 1
        ]
        self._claim("no stage opened, passed or halted twice, and no rollout ended twice", wrong)

    def nothing_was_asked_twice(self) -> None:
        """A person's deed is one entry of the log, however often its request was sent."""
        deeds = Counter(
            (entry.action, entry.subject, str(entry.detail.get("version")))
            for entry in self.session.scalars(select(AuditEntry))
            if entry.action in ("rollout.start", "rollout.abort")
        )
        specs = Counter(self.session.scalars(select(RolloutSpec.rollout_id)))
        wrong = [f"{deed}: {count} times" for deed, count in deeds.items() if count > 1]
        wrong += [f"r-{number}: {count} revisions" for number, count in specs.items() if count > 2]
        self._claim("what was asked was done once, though requests were sent again", wrong)

    # --- what was published ----------------------------------------------------------------------------

    def a_halted_release_is_offered_to_nobody(self, bad: str) -> None:
        words = list(self._words())
        halted = next((n for n, (_, word) in enumerate(words) if _is_halted(word, bad)), None)
        if halted is None:
            self._claim("the bad release was halted", ["no directive says so"])
            return
        first = words[halted][0]
        later = [
            f"timestamp {row.version}"
            for row, word in words[halted:]
            if word["release"] == bad and not _is_halted(word, bad)
        ]
        self._claim("after the halt no directive offers the halted release", later)
        installs = [one for one in self.fleet.installs if one.version == bad]
        after = [f"{one.agent} by {one.timestamp}" for one in installs if one.timestamp >= first.version]
        self._claim(f"none of its {len(installs)} trials was begun by a word after the halt", after)
        events = self.session.scalars(select(RolloutEvent.at).join(Rollout).where(Rollout.version == bad))
        apart = [] if first.created_at in set(events) else [f"signed at {first.created_at}"]
        self._claim("the halt and the directive that says so are one transaction", apart)

    def _words(self) -> Iterator[tuple[MetadataFile, dict]]:
        """Every timestamp with the cohort's directive that stood behind it, in order."""
        rows = {(row.role, row.version): row for row in self.session.scalars(select(MetadataFile))}
        for (role, version), row in sorted(rows.items(), key=lambda item: item[0][1]):
            if role != TIMESTAMP:
                continue
            snapshot = _signed(rows[SNAPSHOT, _signed(row)["meta"]["snapshot.json"]["version"]])
            cohorts = _signed(rows[COHORTS, snapshot["meta"][f"{COHORTS}.json"]["version"]])
            target = cohorts["targets"].get(directive_path(PRODUCT, self.cohort))
            if target is not None:
                assert row.version == version
                yield row, target["custom"]

    def every_version_is_one_file(self, metadata: Path) -> None:
        wrong = [
            f"timestamp {v}: {len(bodies)} bodies"
            for v, bodies in self.fleet.bodies.items()
            if len(bodies) > 1
        ]
        for role in ONLINE_ROLES:
            versions = list(
                self.session.scalars(
                    select(MetadataFile.version)
                    .where(MetadataFile.role == role)
                    .order_by(MetadataFile.version)
                )
            )
            if versions != list(range(1, len(versions) + 1)):
                wrong.append(f"{role} has a gap: {versions}")
        for row in self.session.scalars(select(MetadataFile).where(MetadataFile.role != TIMESTAMP)):
            place = metadata / f"{row.version}.{row.role}.json"
            if place.exists() and place.read_bytes() != row.body:
                wrong.append(f"{place.name} is not the row")
        self._claim("each version of each role is one file, without a gap, here and at the agents", wrong)

    def no_replica_ever_went_back(self) -> None:
        """A poll that began after another had its answer never hears of an older timestamp."""
        wrong, newest = [], 0
        moments = sorted(
            [(ended, 0, version) for _, ended, version in self.fleet.polls]
            + [(began, 1, version) for began, _, version in self.fleet.polls]
        )
        for _, is_beginning, version in moments:
            if not is_beginning:
                newest = max(newest, version)
            elif version < newest:
                wrong.append(f"{version} after {newest}")
        self._claim(f"in {len(self.fleet.polls)} polls no timestamp went back, at either replica", wrong)

    def the_logs_follow(self, signer: Path) -> None:
        head, signed = audit.verify(self.session), verify(signer / "log")
        self._claim(f"{head.id} audit entries and {signed} signatures follow each from the one before", [])

    def all_run(self, version: str) -> None:
        known = Counter(self.session.scalars(select(Agent.version)))
        wrong = [] if known == {version: len(self.fleet.agents)} else [str(known)]
        wrong += [] if self.fleet.on(version) == len(self.fleet.agents) else ["the agents know better"]
        self._claim(f"all {len(self.fleet.agents)} agents run {version}", wrong)


def _signed(row: MetadataFile) -> dict:
    return json.loads(row.body)["signed"]


def _is_halted(word: dict, bad: str) -> bool:
    return word["release"] == bad and word["mode"] == "suspended"


def _state(said: list, rollout: Rollout) -> str:
    """Where an agent's transitions under a rollout's salt lead its attempt."""
    last = [t for t in said if t.version == rollout.version]
    gone_back = any(t.version != rollout.version and t.state is AttemptState.HEALTHY for t in said)
    return str(AttemptState.ROLLED_BACK if gone_back else last[-1].state)
