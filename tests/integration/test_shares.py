"""A site behind a thin line: its agents download in turn, and never with more than its budget together."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from release_server.shares import LASTS
from tests import postgres
from tests.integration.test_kills import is_downloading
from tests.integration.world import Host, until
from updater import control
from updater.transport import CHUNK

pytestmark = pytest.mark.skipif(
    postgres.WANTED, reason="the account is kept by triggers of SQLite; test_shares_race.py runs on both"
)

NEW = "1.1.0"
BUDGET_BPS, AT_ONCE = 1_000_000, 2
SITE = "berlin"

KEEP_ACCOUNT = """
CREATE TABLE told_shares (at TEXT, agent_id TEXT, rate_bps INTEGER, until TEXT);
CREATE TRIGGER told_first AFTER INSERT ON download_shares BEGIN
  INSERT INTO told_shares VALUES (strftime('%Y-%m-%d %H:%M:%f'), NEW.agent_id, NEW.rate_bps, NEW.until);
END;
CREATE TRIGGER told_again AFTER UPDATE ON download_shares BEGIN
  INSERT INTO told_shares VALUES (strftime('%Y-%m-%d %H:%M:%f'), NEW.agent_id, NEW.rate_bps, NEW.until);
END;
CREATE TRIGGER told_last AFTER DELETE ON download_shares BEGIN
  INSERT INTO told_shares VALUES (strftime('%Y-%m-%d %H:%M:%f'), OLD.agent_id, 0, OLD.until);
END;
"""
"""Each change of a share is written down by the database itself, in the transaction that makes it."""


class Account:
    """The server's own account of its site's line."""

    def __init__(self, world):
        self._file = world.server_data / "relfleet.db"
        self._write(lambda database: database.executescript(KEEP_ACCOUNT))

    def _write(self, change):
        with closing(sqlite3.connect(self._file, timeout=60)) as database, database:
            change(database)

    def _rows(self, query):
        with closing(sqlite3.connect(self._file, timeout=60)) as database:
            return database.execute(query).fetchall()

    def now(self):
        """The rate of each agent that has asked; 0 of one that waits."""
        return dict(self._rows("SELECT agent_id, rate_bps FROM download_shares"))

    def downloads(self):
        return {name for name, rate_bps in self.now().items() if rate_bps}

    def let_time_pass(self, host):
        """As if the host's share had been granted so much earlier."""
        earlier = f"strftime('%Y-%m-%d %H:%M:%f000', until, '-{LASTS.total_seconds():.0f} seconds')"
        change = f"UPDATE download_shares SET until = {earlier} WHERE agent_id = ?"
        self._write(lambda database: database.execute(change, (host.name,)))

    def told(self):
        """Every change in its order: when, whose, how much, until when."""
        rows = self._rows("SELECT at, agent_id, rate_bps, until FROM told_shares ORDER BY rowid")
        return [(moment(at), name, rate_bps, moment(ends)) for at, name, rate_bps, ends in rows]

    def sums(self):
        """What was out at one time after each change, by what had not ended."""
        held, found = {}, []
        for at, name, rate_bps, ends in self.told():
            held[name] = (rate_bps, ends)
            found.append(sum(rate_bps for rate_bps, ends in held.values() if ends > at))
        return found

    def transfers(self, host):
        """How long the host had each of its shares, and how large it was."""
        found, began = [], None
        for at, name, rate_bps, _ in self.told():
            if name != host.name:
                continue
            if began is not None and not rate_bps:
                found.append((at - began[0], began[1]))
            began = (began or (at, rate_bps)) if rate_bps else None
        return found


def moment(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.fixture
def hosts(world):
    """Of one site, on the version before."""
    cohort = world.cohort()
    hosts = [Host(world, f"{SITE}-{number}", cohort) for number in range(4)]
    for child in [host.begin_enrolment("--label", f"site={SITE}") for host in hosts]:
        world.processes.finish(child)
    for host in hosts:
        host.start()
    for host in hosts:
        host.await_look("up-to-date")
    return hosts


def lead(hosts):
    """Have whoever waits ask again, until all have the new version; by itself each would after minutes."""

    def has_it(host):
        for other in hosts:
            if other.reason == "budget":
                control.wake(other.layout)
        return host.good == NEW

    for host in hosts:
        until(f"{host.name} to have its turn", lambda host=host: has_it(host), every_s=1.0)
        host.await_good(NEW)


def test_a_sites_agents_share_its_line_and_one_that_is_killed_gives_its_share_back_by_time(world, hosts):
    world.publish(NEW)
    terms = {"scope": "site", "bytes_per_s": BUDGET_BPS, "at_once": AT_ONCE}
    world.client.patch(f"/cohorts/probe/{hosts[0].cohort}", {"budget": terms})
    account = Account(world)
    rollout = world.roll_out(NEW, hosts[0].cohort)

    # As many download as may; they die with their shares, and the line is full of the dead.
    def killed():
        found = [host for host in hosts if is_downloading(host) and host.name in account.downloads()]
        return found if len(found) == AT_ONCE else None

    dead = until("as many to download as may at once", killed, every_s=0.02)
    for host in dead:
        host.kill(everything=True)
    left = [host for host in hosts if host not in dead and host.good != NEW]
    assert left, "somebody waits"
    for host in left:
        host.await_look("budget")
    assert account.downloads() == {host.name for host in dead}

    # Their time ends: others have the line, and then they themselves, who go on with what had come.
    for host in dead:
        account.let_time_pass(host)
    lead(left)
    for host in dead:
        host.start_again()
    lead(dead)
    ended = world.await_rollout(rollout, "completed")
    assert ended["counters"]["healthy"] == len(hosts)

    assert max(account.sums()) == BUDGET_BPS, "all of the line was given out, and never more"
    assert account.downloads() == set()
    length = world.archive(NEW).stat().st_size
    for host in left:
        (took, rate_bps), *more = account.transfers(host)
        assert (rate_bps, more) == (BUDGET_BPS // AT_ONCE, [])
        assert took >= timedelta(seconds=(length - CHUNK) / rate_bps), "it kept to its share"
