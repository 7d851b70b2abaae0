"""`make chaos`: replicas and their database are killed while 300 simulated agents are rolled out.

Twice well, and once badly.
In the end everything must be as if nobody had been killed. A run is repeated by its seed, which it prints, as
far as kills can be: RELFLEET_CHAOS_SEED=N.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from agent_core.errors import ConflictError, RelfleetError, UnreachableError
from release_server.database import Sessions, make_engine
from release_server.demo.processes import wait_for
from tests import postgres
from tests.chaos.fleet import LIMIT, SITES, Fleet
from tests.chaos.proof import Proof
from tests.chaos.replicas import KILLS, Replicas
from tests.integration.world import PRODUCT

if TYPE_CHECKING:
    from collections.abc import Callable

SEED = "RELFLEET_CHAOS_SEED"
COHORT = "chaos"
GOOD, BAD, LAST = "1.1.0", "1.2.0", "1.3.0"
PATIENCE_S = 400.0
"""On a machine that does other things as well; alone it takes a tenth of it."""
KILL_EVERY_S = 2.0
DURABLE = {"synchronous_commit": "on"}
"""A killed database keeps what it has answered; only a power cut could tell the other settings of tests."""


class Story:
    """One run: the replicas, their fleet, and the dice.

    Args:
        kills: how many; more when a kind has not come to pass.
    """

    def __init__(self, world: Replicas, agents: int, dice: random.Random, kills: int) -> None:
        self.world, self.count, self.dice, self.most_kills = world, agents, dice, kills
        self.killing, self.next_kill, self.patient_until = False, 0.0, 0.0
        self.kinds: list[str] = []

    def make(self) -> Fleet:
        """Everything is there, and nobody was killed yet."""
        world = self.world
        world.make()
        world.publish(GOOD, BAD, LAST)
        cohort = {"match": "test=chaos", "release": "1.0.0", "poll_s": 4, "report_s": 12}
        lease = {"scope": "site", "limit": LIMIT}
        world.client.post("/cohorts", {"product": PRODUCT, "name": COHORT, "lease": lease, **cohort})
        world.client.post("/cohorts", {"product": PRODUCT, "name": "spare", "match": "test=nobody"})
        token = world.token.read_text().strip()
        fleet = Fleet(world.home, world.urls, world.trust.read_bytes(), token, {BAD})
        for number in range(self.count):
            fleet.enroll(f"sim-{number}", f"s{number % SITES}", {"test": COHORT})
        return fleet

    def tell(self, fleet: Fleet) -> None:
        self.killing = True
        self._completes(self._begin(GOOD, 0.03, 0.3, 1.0))
        halted = self._begin(BAD, 0.1, 1.0)
        self._await("the bad release to be halted", lambda: self._state(halted) == "paused")
        self._await("a little time to pass", self._after(4.0))
        self._await("the abort", lambda: self._abort(halted))
        self._await("all to go back", lambda: self._state(halted) == "rolled_back")
        self._completes(self._begin(LAST, 0.2, 1.0))
        self._await("every kind of kill", lambda: set(KILLS) <= set(self.kinds))
        self.killing = False
        self._await("the fleet to rest", lambda: fleet.on(LAST) == self.count and fleet.is_quiet())

    # --- the operator ------------------------------------------------------------------------------------

    def _begin(self, version: str, *shares: float) -> int:
        stages = [
            {"share_bp": round(share * 10_000), "max_failed": 0, "max_silent": self.count} for share in shares
        ]
        body = {"product": PRODUCT, "cohort": COHORT, "version": version, "stages": stages}
        return self._await(f"{version} to begin", lambda: self._ask_to_begin(body))

    def _ask_to_begin(self, body: dict) -> int | None:
        """Start it, or find it: the answer to the first request may have been lost."""
        with suppress(ConflictError):
            return int(self.world.client.post("/rollouts", body)["id"])
        found = self.world.client.items("/rollouts", product=PRODUCT, cohort=COHORT)
        return next((int(one["id"]) for one in found if one["version"] == body["version"]), None)

    def _abort(self, number: int) -> bool:
        with suppress(ConflictError):
            self.world.client.post(f"/rollouts/{number}/abort", {"reason": "it is bad", "rollback": True})
        return self._state(number) in ("rolling_back", "rolled_back")

    def _state(self, number: int) -> str:
        return str(self.world.rollout(number)["state"])

    def _completes(self, number: int) -> None:
        def has_completed() -> bool:
            found = self.world.rollout(number)
            if found["state"] == "paused":
                raise AssertionError(f"a good release was halted: {found['reason']} {found['detail']}")
            return bool(found["state"] == "completed")

        self._await(f"r-{number} to complete", has_completed)

    # --- waiting, and killing meanwhile ------------------------------------------------------------------

    def _after(self, seconds: float) -> Callable[[], bool]:
        ends = time.monotonic() + seconds
        return lambda: time.monotonic() > ends

    def _await(self, what: str, found: Callable[[], object]) -> object:
        def look() -> object:
            self.world.processes.revive()
            if self.killing and self._is_time():
                self._kill()
            with suppress(UnreachableError):
                return found()
            return None

        return wait_for(what, look, within_s=PATIENCE_S, every_s=0.2)

    def _is_time(self) -> bool:
        """Mostly when all is well again: else nothing would be done that could be lost."""
        now = time.monotonic()
        enough = self.world.kills.total() >= self.most_kills and set(KILLS) <= set(self.kinds)
        return not enough and now >= self.next_kill and (now >= self.patient_until or self.world.is_well())

    def _kill(self) -> None:
        """Every kind once before any by its weight."""
        missing = [kind for kind in KILLS if kind not in self.kinds]
        kind = (
            self.dice.choice(missing) if missing else self.dice.choices(list(KILLS), list(KILLS.values()))[0]
        )
        before = self.world.kills.total()
        self.world.kill_one(kind)
        if self.world.kills.total() > before:
            self.kinds.append(kind)
        self.next_kill = time.monotonic() + KILL_EVERY_S * self.dice.uniform(0.5, 1.5)
        self.patient_until = self.next_kill + self.dice.choice([0.0, 10.0, 10.0, 10.0])


def run(agents: int, kills: int) -> int:
    seed = int(os.environ.get(SEED, random.randrange(10**6)))
    began, home = time.monotonic(), Path(tempfile.mkdtemp(prefix="relfleet-chaos-"))
    cluster = postgres.Cluster(**DURABLE)
    failed = True
    try:
        with cluster.database() as url:
            world = Replicas(home, cluster, url, random.Random(seed))
            try:
                failed = _run(Story(world, agents, random.Random(seed), kills), seed, began)
            finally:
                world.processes.stop()
    finally:
        cluster.remove()
        if failed:
            print(f"  its logs are kept in {home}")
        else:
            subprocess.run(["rm", "-rf", home], check=False)
    return int(failed)


def _run(story: Story, seed: int, began: float) -> bool:
    world = story.world
    fleet = story.make()
    print(
        f"chaos  seed {seed}; two replicas, one PostgreSQL, {len(fleet.agents)} agents: made in "
        f"{time.monotonic() - began:.0f} s",
        flush=True,
    )
    fleet.start()
    wrong = []
    try:
        story.tell(fleet)
    except (RelfleetError, AssertionError) as error:
        wrong = [str(error)]
    finally:
        fleet.stop()
    with closing(Sessions(make_engine(world.database_url))) as sessions, sessions.read() as session:
        proof = Proof(session, fleet, COHORT)
        proof.all(BAD, world.metadata, world.server_data / "signer")
        proof.all_run(LAST)
    _print(world, fleet, proof, [*wrong, *proof.wrong], time.monotonic() - began)
    return bool(wrong or proof.wrong)


def _print(world: Replicas, fleet: Fleet, proof: Proof, wrong: list[str], passed_s: float) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(world.kills.items()))
    print(f"  {world.kills.total()} kills: {kinds}")
    troubles = ", ".join(f"{count} {reason}" for reason, count in fleet.troubles.most_common())
    print(f"  {fleet.requests} requests of agents, of which failed and were sent again: {troubles or 'none'}")
    for claim in proof.checked:
        print(f"  {'ok' if not any(one.startswith(claim) for one in wrong) else 'NO'}  {claim}")
    for one in wrong:
        print(f"  failed: {one}")
    print(f"chaos  {'failed' if wrong else 'passed'} in {passed_s:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--agents", type=int, default=300)
    parser.add_argument("--kills", type=int, default=24)
    asked = parser.parse_args()
    if postgres.binaries() is None:
        print("chaos  not run here: PostgreSQL's programs are not installed")
        return 1
    return run(asked.agents, asked.kills)


if __name__ == "__main__":
    sys.exit(main())
