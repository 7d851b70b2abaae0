"""The spool: numbers that only grow, bounds, damage and full disks, with real SQLite files."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from agent_core.spool import KEPT_ASIDE, MAX_WAITING, Spool
from agent_core.wire import AttemptState, Transition

AT = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def add(spool: Spool, state: AttemptState = AttemptState.TRIAL, **more: str) -> int:
    return spool.add_transition(AT, version="1.2.3", digest="d", salt="s", state=state, **more)


def numbers(spool: Spool) -> list[int]:
    return [transition.number for transition in spool.pending()]


def test_transitions_are_numbered_kept_in_order_and_forgotten_when_accepted(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool.db") as spool:
        assert [add(spool), add(spool, AttemptState.ROLLED_BACK, reason="unhealthy", detail="x" * 5000)] == [
            1,
            2,
        ]
        first, second = spool.pending()
        assert first == Transition(1, "2026-01-31T12:00:00Z", "1.2.3", "d", "s", AttemptState.TRIAL)
        assert (second.state, second.reason) == (AttemptState.ROLLED_BACK, "unhealthy")
        assert Transition.from_json(second.to_json()) == second  # the detail is cut to what the wire takes
        assert [transition.number for transition in spool.pending(limit=1)] == [1]
        spool.accepted(1)
        assert numbers(spool) == [2]


def test_numbers_go_on_after_a_restart_even_when_all_were_accepted(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool.db") as spool:
        assert add(spool) == 1
        spool.accepted(1)
    with Spool(tmp_path / "spool.db") as spool:
        assert add(spool) == 2


def test_no_file_is_mapped_so_a_full_disk_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool.db") as spool:
        assert add(spool) == 1
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_two_processes_never_give_out_the_same_number(tmp_path: Path) -> None:
    program = (
        "import sys; from datetime import datetime, UTC; from pathlib import Path\n"
        "from agent_core.spool import Spool; from agent_core.wire import AttemptState\n"
        "spool = Spool(Path(sys.argv[1]))\n"
        "for _ in range(25):\n"
        "    number = spool.add_transition("
        "datetime.now(UTC), version='1', digest='', salt='', state=AttemptState.TRIAL)\n"
        "    print(number)\n"
        "spool.close()\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "spool.db")],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(2)
    ]
    given = [int(line) for child in both for line in child.communicate(timeout=30)[0].split()]
    assert sorted(given) == list(range(1, 51))
    with Spool(tmp_path / "spool.db") as spool:
        assert numbers(spool) == list(range(1, 51))


@pytest.mark.parametrize("damage", ["garbage", "truncated", "middle"])
def test_a_damaged_database_is_kept_aside_and_numbers_go_on(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "spool.db"
    with Spool(path) as spool:
        for _ in range(40):
            add(spool, detail="words " * 100)
    whole = path.read_bytes()
    if damage == "garbage":
        path.write_bytes(os.urandom(len(whole)))
    elif damage == "truncated":
        path.write_bytes(whole[:5000])
    else:
        path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with Spool(path) as spool:
        assert add(spool) == 41
        assert numbers(spool)[-1] == 41
        assert spool.problem == ""
    assert len(list(tmp_path.glob("spool.db.damaged-*"))) == 1
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_only_a_few_damaged_databases_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    for expected in range(1, 6):
        with Spool(path) as spool:
            assert add(spool) == expected
        path.write_bytes(b"garbage" * 1000)
    assert len(list(tmp_path.glob("spool.db.damaged-*"))) == KEPT_ASIDE


def test_when_both_memories_are_lost_numbers_come_from_the_clock_and_stay_above(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with Spool(path) as spool:
        add(spool)
    path.write_bytes(b"garbage" * 1000)
    path.with_suffix(".high").write_bytes(b"garbage")
    with Spool(path) as spool:
        number = add(spool)
        assert number == int(AT.timestamp()) + 1
        assert add(spool) == number + 1


def test_what_the_server_already_has_lifts_the_numbers_of_an_agent_that_forgot(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool.db") as spool:
        spool.accepted(900)
        assert add(spool) == 901
    (tmp_path / "spool.high").unlink()
    with Spool(tmp_path / "spool.db") as spool:
        assert add(spool) == 902


def test_a_lost_side_file_does_not_set_the_numbers_back(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool.db") as spool:
        add(spool)
        spool.accepted(1)
    (tmp_path / "spool.high").write_bytes(b"")
    with Spool(tmp_path / "spool.db") as spool:
        assert add(spool) == 2


def test_a_spool_that_can_never_be_written_raises_nothing_and_stays_bounded(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "no" / "such" / "directory" / "spool.db")
    given = [add(spool) for _ in range(MAX_WAITING + 5)]
    assert given == sorted(set(given))
    assert spool.waiting == MAX_WAITING
    assert spool.lost == 5
    assert numbers(spool) == given[5:105]
    spool.add_sample(AT, {"rss": 1})
    spool.accepted(given[-1])
    assert (spool.pending(), spool.samples(), spool.dropped, spool.lost) == ([], [], 0, 6)
    assert spool.problem
    spool.close()


def test_on_a_full_disk_transitions_wait_in_memory_and_are_written_when_there_is_room(tmp_path: Path) -> None:
    """The kernel refuses to let files grow, as on a full disk: numbers grow and all is reported."""
    program = (
        "import resource, sys; from datetime import datetime, UTC; from pathlib import Path\n"
        "from agent_core.spool import Spool; from agent_core.wire import AttemptState\n"
        "def add(spool, detail):\n"
        "    return spool.add_transition(datetime.now(UTC), version='1', digest='', salt='',"
        " state=AttemptState.TRIAL, detail=detail)\n"
        "spool = Spool(Path(sys.argv[1]))\n"
        "given = [add(spool, '')]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))\n"
        "given += [add(spool, 'x' * 1900) for _ in range(80)]\n"
        "assert spool.waiting > 0 and spool.problem, (spool.waiting, spool.problem)\n"
        "assert [t.number for t in spool.pending(100)] == given\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "given.append(add(spool, 'room again'))\n"
        "assert spool.waiting == 0, spool.problem\n"
        "assert [t.number for t in spool.pending(100)] == given == list(range(1, 83))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "spool.db")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_samples_beyond_the_count_give_way_oldest_first_and_are_counted(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool.db", max_samples=3) as spool:
        for value in range(5):
            spool.add_sample(AT, {"rss": value})
        assert [figures["rss"] for _, _, figures in spool.samples()] == [2, 3, 4]
        assert spool.dropped == 2
        spool.forget_samples(spool.samples()[1][0])
        assert [figures["rss"] for _, _, figures in spool.samples()] == [4]


def test_samples_beyond_the_bytes_give_way_too(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool.db", max_bytes=100) as spool:
        for value in range(20):
            spool.add_sample(AT, {"rss": value, "cpu": 1.5})
        kept = spool.samples()
        assert 1 < len(kept) < 6
        assert kept[-1][2]["rss"] == 19
        assert spool.dropped == 20 - len(kept)


def test_a_state_that_only_a_newer_version_knows_is_passed_over(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool.db") as spool:
        add(spool)
        spool._connect().execute("INSERT INTO transitions VALUES (2, '', '9', '', '', 'teleported', '', '')")
        assert numbers(spool) == [1]
        assert add(spool) == 3


def test_a_database_that_another_process_replaced_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with Spool(path) as spool, Spool(path) as other:
        add(spool)
        path.replace(tmp_path / "elsewhere")
        assert add(other) == 2
        assert add(spool) == 3
        assert numbers(spool) == numbers(other)


class NumbersOnlyGrow(RuleBasedStateMachine):
    """Whatever is lost between two additions, no number is given out twice and none goes down."""

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.room = tempfile.TemporaryDirectory()
        self.path = Path(self.room.name) / "spool.db"
        self.spool = Spool(self.path)
        self.highest = 0

    @rule()
    def add(self) -> None:
        number = add(self.spool)
        assert number > self.highest
        self.highest = number

    @rule(share=st.floats(0, 1))
    def accept(self, share: float) -> None:
        self.spool.accepted(int(self.highest * share))

    @rule()
    def restart(self) -> None:
        self.spool.close()
        self.spool = Spool(self.path)

    @rule()
    def damage_the_database(self) -> None:
        self.spool.close()
        if self.path.exists():
            self.path.write_bytes(b"garbage" * 700)
        self.spool = Spool(self.path)

    @rule()
    def lose_the_database(self) -> None:
        self.spool.close()
        self.path.unlink(missing_ok=True)
        self.spool = Spool(self.path)

    def teardown(self) -> None:
        if hasattr(self, "room"):
            self.spool.close()
            self.room.cleanup()


TestNumbersOnlyGrow = NumbersOnlyGrow.TestCase
TestNumbersOnlyGrow.settings = hypothesis_settings(max_examples=15, stateful_step_count=15, deadline=None)
