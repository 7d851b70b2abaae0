"""Webhooks: told in the transaction of the deed, sent after its commit, in order, signed, once in effect."""

from __future__ import annotations

import hmac
import json
import logging
from base64 import b64decode, b64encode
from datetime import timedelta

import pytest
from sqlalchemy import event, select

from agent_core.errors import RelfleetError
from release_server import cohorts, fleet
from release_server.jobs import Jobs, LostLeaseError, take_lease
from release_server.models import AuditEntry, CohortStatus, WebhookDelivery, WebhookSecret
from release_server.retention.pruner import Pruner
from release_server.serve import show_logs
from release_server.webhooks import outbox, schedule, sender, subscriptions
from release_server.webhooks.vault import Vault
from tests.release_server.fleet_world import World
from tests.release_server.operator_desk import desk as desk_of
from tests.release_server.test_stolen_database import everything
from tests.release_server.webhook_world import receiver


@pytest.fixture
def world(sessions, clock):
    return World(sessions, clock)


@pytest.fixture
def vault(config):
    return Vault(config.webhook_key)


@pytest.fixture
def subscribe(world, vault):
    """Add a webhook; its number and secret."""

    def add(url, *wanted, **said):
        wanted = list(wanted) or ["*"]
        webhook, secret = world.call(subscriptions.add, vault, url=url, wanted=wanted, **said)
        return webhook.id, secret

    return add


@pytest.fixture
def make_sender(sessions, clock, vault):
    def make(guard=lambda session: None, leads=lambda: True, spread=0.5, **said):
        return sender.Sender(
            sessions, vault, guard=guard, leads=leads, clock=clock, spread=lambda: spread, **said
        )

    return make


@pytest.fixture
def send(make_sender):
    return make_sender().send_due


@pytest.fixture
def heard():
    with receiver() as made:
        yield made


def kept(world, webhook=1):
    with world.read() as session:
        found = outbox.deliveries(session, webhook)
        return [(row.sequence, row.type, row.state, row.tries, row.answer) for row in reversed(found)]


def states(world, webhook=1):
    return [row[2] for row in kept(world, webhook)]


def is_signed(headers, body, secret):
    """As the specification says it, written anew: a receiver's part."""
    key = b64decode(secret.removeprefix("whsec_"))
    signed = b".".join([headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body])
    wanted = "v1," + b64encode(hmac.digest(key, signed, "sha256")).decode()
    return wanted in headers["webhook-signature"].split(" ")


def tell(world, kind="release.published", **data):
    with world.write() as session:
        outbox.tell(session, world.clock(), kind, "demo", **data)


# --- what is told ----------------------------------------------------------------------------------------


def test_a_rollout_is_told_from_its_start_to_its_end_in_order(world, heard, subscribe, send):
    world.cohort()
    host = world.enroll("web-1")
    subscribe(heard.url, "rollout.*")
    rollout = world.start()
    world.tick()
    world.finish(host, rollout, "healthy")
    world.tick()
    world.tick(minutes=60)
    world.call(fleet.undo, rollout)
    host.version = "1.0.0"
    world.report(host)
    world.tick(minutes=5)
    send()
    assert heard.types() == [
        "rollout.stage_opened",
        "rollout.stage_passed",
        "rollout.stage_opened",
        "rollout.stage_passed",
        "rollout.completed",
        "rollout.rolling_back",
        "rollout.rolled_back",
    ]
    assert heard.sequences() == [1, 2, 3, 4, 5, 6, 7]
    told = json.loads(heard.got[0][1])
    assert (told["data"]["rollout"], told["data"]["cohort"], told["data"]["stage"]) == ("r-1", "all", 1)
    assert (told["data"]["version"], told["data"]["base"]) == ("1.1.0", "1.0.0")


def test_a_halt_is_told_with_its_reason_and_its_numbers(world, heard, subscribe, send):
    world.cohort()
    host = world.enroll("web-1")
    subscribe(heard.url, "rollout.halted", "rollout.paused")
    rollout = world.start()
    world.tick()
    world.finish(host, rollout, "rolled_back", reason="exited")
    world.tick()
    send()
    (told,) = [json.loads(body) for _, body in heard.got]
    assert (told["type"], told["data"]["reason"]) == ("rollout.halted", "max-failed")
    assert told["data"]["numbers"]["rolled_back"] == 1


def test_a_release_is_told_with_its_transaction(world_of_releases, heard, send):
    accept, trusted, blobs, subscribe_to = world_of_releases
    subscribe_to(heard.url)
    targets = trusted.targets()
    trusted.add(targets, blobs, "1.0.0", 1)
    accept(targets)
    send()
    (told,) = [json.loads(body) for _, body in heard.got]
    assert (told["type"], told["data"]["version"], told["data"]["seq"]) == ("release.published", "1.0.0", 1)


@pytest.fixture
def world_of_releases(trusted, accept, blobs, sessions, clock, vault):
    def subscribe_to(url):
        with sessions.write() as session:
            subscriptions.add(session, clock(), "ada", vault, url=url, wanted=["release.*"])

    return accept, trusted, blobs, subscribe_to


def test_an_agent_that_waits_to_be_accepted_is_told_and_one_that_does_not_is_not(
    world, heard, subscribe, send, token
):
    subscribe(heard.url, "agent.waiting")
    world.enroll("web-1")
    world.enroll("web-2", token=token("enroller", name="lab", approve=True))
    send()
    (told,) = [json.loads(body)["data"] for _, body in heard.got]
    assert (told["agent"], told["actor"], told["product"]) == ("web-2", "lab", "demo")


def test_a_fleet_stands_when_its_last_cohort_is_frozen_and_goes_with_the_first(world, heard, subscribe, send):
    world.cohort("eu", match="region=eu")
    world.cohort("us", match="region=us")
    subscribe(heard.url, "cohort.*", "fleet.*")
    for verb, name in (
        ("freeze", "eu"),
        ("freeze", "eu"),
        ("freeze", "us"),
        ("unfreeze", "us"),
        ("unfreeze", "eu"),
    ):
        world.call(getattr(cohorts, verb), "demo", name, reason="a fire")
    send()
    assert heard.types() == [
        "cohort.frozen",
        "cohort.frozen",
        "fleet.stopped",
        "cohort.unfrozen",
        "fleet.resumed",
        "cohort.unfrozen",
    ]
    assert json.loads(heard.got[2][1])["data"] == {"product": "demo", "reason": "a fire", "actor": "olga"}


def test_a_freeze_that_lapsed_stands_no_more_when_the_next_is_told(world, heard, subscribe, send):
    world.cohort("eu")
    subscribe(heard.url, "cohort.*", "fleet.*")
    for _ in range(2):
        world.call(cohorts.freeze, "demo", "eu", until=world.clock() + timedelta(hours=1))
        world.clock.step(hours=1)
    world.call(cohorts.unfreeze, "demo", "eu")
    send()
    assert heard.types() == ["cohort.frozen", "fleet.stopped", "cohort.unfrozen", "fleet.resumed"] * 2


LUNCH = {"lunch": "fri 12:30-13:00 UTC", "nap": "fri 13:00-13:30 UTC"}


def test_what_the_calendar_freezes_is_told_once_when_it_begins_and_once_when_it_ends(
    world, heard, subscribe, send
):
    """By the jobs process, also in the middle of a freeze by hand, which is told by itself."""
    for name in ("eu", "us"):
        world.cohort(name, match=f"region={name}", calendar=LUNCH)
    subscribe(heard.url, "cohort.*", "fleet.*")
    world.call(cohorts.freeze, "demo", "eu", until=world.clock() + timedelta(minutes=45), reason="a fire")
    for _ in range(14):
        world.tick(minutes=10)
        world.tick()
    send()
    told = [(at, kind, data.get("cohort"), data.get("by"), data["actor"]) for at, kind, data in said(heard)]
    assert told == [
        ("12:00", "cohort.frozen", "eu", "", "olga"),
        ("12:30", "cohort.frozen", "eu", "lunch", "server"),
        ("12:30", "cohort.frozen", "us", "lunch", "server"),
        ("12:30", "fleet.stopped", None, None, "server"),
        ("12:45", "cohort.unfrozen", "eu", "", "server"),
        ("13:30", "cohort.unfrozen", "eu", "lunch", "server"),
        ("13:30", "fleet.resumed", None, None, "server"),
        ("13:30", "cohort.unfrozen", "us", "lunch", "server"),
    ]
    assert said(heard)[1][2]["until"] == "2026-05-01T13:30:00Z"
    with world.read() as session:
        lines = [
            (entry.action, entry.subject, entry.detail)
            for entry in session.scalars(select(AuditEntry).order_by(AuditEntry.id))
            if entry.actor == "server" and entry.subject == "demo/eu"
        ]
    assert lines == [
        ("cohort.freeze", "demo/eu", {"by": "lunch", "until": "2026-05-01T13:30:00Z"}),
        ("cohort.unfreeze", "demo/eu", {"reason": "its time is over", "at": "2026-05-01T12:45:00Z"}),
        ("cohort.unfreeze", "demo/eu", {"by": "lunch"}),
    ]


def test_a_freeze_that_began_and_ended_while_no_jobs_process_was_there_is_told_in_its_order(
    world, heard, subscribe, send
):
    """Of two days; by a person, too, who steers a cohort before jobs are back."""
    lunch = {"lunch": "mon-sun 12:30-13:00 UTC"}
    for name in ("eu", "us"):
        world.cohort(name, match=f"region={name}", calendar=lunch)
    subscribe(heard.url, "cohort.*", "fleet.*")
    world.clock.step(hours=22)
    world.call(cohorts.edit, "demo", "us", calendar={})
    world.tick(hours=4)
    assert world.tick() is False
    send()
    told = [(at, kind, data.get("cohort"), data.get("until")) for at, kind, data in said(heard)]
    first, second = (f"2026-05-{day}T13:00:00Z" for day in ("01", "02"))
    assert told == [
        ("12:30", "cohort.frozen", "eu", first),
        ("12:30", "cohort.frozen", "us", first),
        ("12:30", "fleet.stopped", None, None),
        ("13:00", "cohort.unfrozen", "eu", None),
        ("13:00", "fleet.resumed", None, None),
        ("13:00", "cohort.unfrozen", "us", None),
        ("12:30", "cohort.frozen", "eu", second),
        ("13:00", "cohort.unfrozen", "eu", None),
    ]
    with world.read() as session:
        entries = session.scalars(select(AuditEntry).order_by(AuditEntry.id)).all()
    lines = [(entry.action, entry.detail["at"]) for entry in entries if "at" in entry.detail]
    moments = ("2026-05-01T12:30:00Z", "2026-05-01T13:00:00Z", "2026-05-02T12:30:00Z", "2026-05-02T13:00:00Z")
    assert sorted(lines) == sorted(
        [("cohort.freeze", moments[0])] * 2
        + [("cohort.unfreeze", moments[1])] * 2
        + [("cohort.freeze", moments[2]), ("cohort.unfreeze", moments[3])]
    )


def test_of_a_calendar_that_nobody_looked_at_for_years_the_work_is_bounded_and_the_end_right(world):
    world.cohort("eu", calendar={"night": "mon-sun 18:00-06:00 UTC"})
    world.tick(days=3_000, hours=8)
    assert world.tick() is False
    with world.read() as session:
        status = session.scalars(select(CohortStatus)).one()
    assert (status.frozen_by, status.directive["mode"]) == ("night", "suspended")


def test_nor_does_the_work_grow_with_the_cohorts_that_have_one(world, monkeypatch):
    monkeypatch.setattr(cohorts, "MOST_MISSED", 6)
    for number in range(3):
        world.cohort(f"eu-{number}", match=f"n={number}", calendar={"night": "mon-sun 18:00-06:00 UTC"})
    world.tick(days=9, hours=8)
    with world.read() as session:
        stands = [status.frozen_by for status in session.scalars(select(CohortStatus))]
        lines = session.scalars(select(AuditEntry).where(AuditEntry.action.like("cohort.%freeze"))).all()
    assert (stands, len(lines)) == (["night"] * 3, 6 + 3)


def test_a_freeze_whose_end_changes_is_told_again_once(world, heard, subscribe, send):
    """Longer by hand; then by another entry of the calendar, which ends earlier."""
    world.cohort("eu", calendar={"week": "mon-sun 00:00-23:00 UTC"})
    world.tick()
    subscribe(heard.url, "cohort.*", "fleet.*")
    for hours in (1, 5, 5):
        world.call(cohorts.freeze, "demo", "eu", until=world.clock.now + timedelta(hours=hours))
        world.tick()
    calendars = (
        {"week": "mon-sun 00:00-22:00 UTC"},
        {"fair": "fri 00:00-20:00 UTC"},
        {"lull": "fri 00:00-20:00 UTC"},
    )
    for calendar in calendars:
        world.call(cohorts.edit, "demo", "eu", calendar=calendar)
        world.tick()
    world.call(cohorts.edit, "demo", "eu", calendar={})
    world.call(cohorts.unfreeze, "demo", "eu")
    send()
    assert [(kind, data.get("by"), (data.get("until") or "")[11:16]) for _, kind, data in said(heard)] == [
        ("cohort.frozen", "", "13:00"),
        ("cohort.frozen", "", "17:00"),
        ("cohort.frozen", "week", "22:00"),
        ("cohort.frozen", "fair", "20:00"),
        ("cohort.frozen", "lull", "20:00"),
        ("cohort.unfrozen", "lull", ""),
        ("cohort.unfrozen", "", ""),
        ("fleet.resumed", None, ""),
    ]


def said(heard):
    bodies = [json.loads(body) for _, body in heard.got]
    return [(each["timestamp"][11:16], each["type"], each["data"]) for each in bodies]


def test_what_was_rolled_back_is_told_to_nobody(world, heard, subscribe, send):
    subscribe(heard.url)
    with world.read() as session:  # rolled back at its end
        outbox.tell(session, world.clock(), "release.published", "demo")
    tell(world)
    send()
    assert heard.sequences() == [1]


def test_a_webhook_is_told_what_it_asked_for_of_its_product_alone(world, heard, subscribe, send):
    subscribe(heard.url, "release.published", product="demo")
    subscribe(heard.url, "rollout.*")
    with world.write() as session:
        outbox.tell(session, world.clock(), "release.published", "another")
    tell(world)
    tell(world, "agent.waiting")
    send()
    assert [(kept(world, 1)), (kept(world, 2))] == [[(1, "release.published", "sent", 1, "200")], []]


def test_a_long_text_is_cut_so_that_a_body_stays_small(world, subscribe, heard, send):
    subscribe(heard.url)
    tell(world, reason="x" * 100_000)
    send()
    assert len(heard.got[0][1]) < 20_000


# --- how it is sent --------------------------------------------------------------------------------------


def test_what_is_sent_is_signed_and_whatever_is_changed_of_it_is_noticed(world, heard, subscribe, send):
    _, secret = subscribe(heard.url)
    tell(world)
    send()
    ((headers, body),) = heard.got
    assert is_signed(headers, body, secret)
    assert headers["content-type"] == "application/json"
    assert headers["webhook-timestamp"] == str(int(world.clock().timestamp()))
    assert not is_signed(headers, body + b" ", secret)
    assert not is_signed(headers | {"webhook-id": "msg_" + "0" * 32}, body, secret)
    assert not is_signed(headers | {"webhook-timestamp": "1"}, body, secret)
    _, another = subscribe(heard.url)
    assert not is_signed(headers, body, another)


def test_after_a_rotation_both_secrets_are_good_until_the_old_one_ends(world, heard, subscribe, send, vault):
    number, old = subscribe(heard.url)
    new = world.call(subscriptions.rotate, vault, number, timedelta(hours=1))
    tell(world)
    send()
    world.clock.step(hours=1)
    tell(world)
    send()
    first, second = heard.got
    assert (is_signed(*first, old), is_signed(*first, new)) == (True, True)
    assert (is_signed(*second, old), is_signed(*second, new)) == (False, True)
    assert len(second[0]["webhook-signature"].split()) == 1


def test_a_rotation_does_not_lengthen_what_another_has_ended(world, heard, subscribe, send, vault):
    number, first = subscribe(heard.url)
    world.call(subscriptions.rotate, vault, number, timedelta(0))  # it was stolen
    world.call(subscriptions.rotate, vault, number, timedelta(days=1))
    tell(world)
    send()
    assert not is_signed(*heard.got[0], first)
    assert len(heard.got[0][0]["webhook-signature"].split()) == 2


def test_a_failure_is_tried_again_later_and_holds_up_what_comes_after_it(world, heard, subscribe, send):
    subscribe(heard.url)
    heard.answers = [500, 503]
    for _ in range(3):
        tell(world)
    send()
    assert heard.sequences() == [1]
    send()
    assert heard.sequences() == [1], "not before the pause is over"
    world.clock.step(seconds=5)
    send()
    world.clock.step(seconds=10)
    send()
    assert heard.sequences() == [1, 1, 1, 2, 3]
    assert len({heard.ids()[place] for place in (0, 1, 2)}) == 1
    assert kept(world)[0] == (1, "release.published", "sent", 3, "200")


def test_a_receiver_that_is_away_is_told_when_it_is_back(world, subscribe, send):
    with receiver() as gone:
        subscribe(gone.url)
    tell(world)
    tell(world)
    send()
    assert kept(world)[0] == (1, "release.published", "pending", 1, "it does not answer (ConnectionError)")
    with receiver() as back:
        with world.write() as session:
            subscriptions.find(session, 1).url = back.url
        world.clock.step(seconds=5)
        send()
        assert back.sequences() == [1, 2]


def test_one_dead_receiver_keeps_nothing_from_another(world, heard, subscribe, send):
    with receiver() as gone:
        subscribe(gone.url)
    subscribe(heard.url)
    for _ in range(30):
        tell(world)
    send()
    assert heard.sequences() == list(range(1, 31))
    assert kept(world, 1)[0][3] == 1, "one try, however much waits"


def test_what_is_not_taken_in_three_days_is_given_up_and_can_be_asked_for_again(
    world, heard, subscribe, send
):
    number, _ = subscribe(heard.url)
    tell(world)
    told_at = world.clock()
    heard.answers = [500] * 1000
    while states(world) != ["dead"]:
        assert world.clock() - told_at <= schedule.LONGEST
        send()
        world.clock.step(hours=12)
    assert len(heard.got) == 7
    heard.answers = []
    tell(world)
    send()
    assert (heard.sequences()[-1], states(world)) == (2, ["dead", "sent"])
    assert world.call(subscriptions.retry, number) == 1
    send()
    assert (heard.sequences()[-1], states(world)) == (1, ["sent", "sent"])


def test_whatever_waits_for_longer_than_three_days_is_given_up_with_the_oldest(world, heard, subscribe, send):
    """Else each would take a try of its own, an hour apart, and more would come than go."""
    subscribe(heard.url)
    heard.answers = [500] * 1000
    tell(world)
    tell(world)
    world.clock.step(hours=1)
    tell(world)
    world.clock.now += schedule.LONGEST - timedelta(hours=1)
    subscribe(heard.url)
    tell(world)
    send()
    assert states(world) == ["dead", "dead", "pending", "pending"]
    assert states(world, 2) == ["pending"]


def test_a_pause_from_a_clock_that_was_ahead_does_not_count(world, heard, subscribe, send):
    subscribe(heard.url)
    heard.answers = [500]
    world.clock.step(days=3650)
    tell(world)
    send()
    world.clock.step(days=-3650)
    send()
    assert states(world) == ["sent"]


def test_one_body_that_a_receiver_refuses_does_not_hold_up_the_others_for_days(world, heard, subscribe, send):
    subscribe(heard.url)
    tell(world)
    tell(world)
    heard.answers = [422] * schedule.REFUSALS
    for _ in range(schedule.REFUSALS):
        send()
        world.clock.step(hours=1)
    assert states(world) == ["dead", "pending"]
    send()
    assert states(world) == ["dead", "sent"]


def test_a_redirect_is_not_followed(world, heard, subscribe, send):
    subscribe(heard.url)
    heard.answers, heard.headers = [307], {"Location": heard.url}
    tell(world)
    send()
    assert len(heard.got) == 1
    assert kept(world)[0][2:] == ("pending", 1, "307")


def test_a_receiver_that_drips_is_left_in_time_and_its_words_are_nowhere(
    world, subscribe, make_sender, monkeypatch
):
    import socket
    import threading

    monkeypatch.setattr(sender, "LONGEST_S", 0.3)
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            peer, _ = listening.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 200 OK\r\nX-Eve: ")
                while not stop.wait(0.02):
                    try:
                        peer.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        subscribe(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        tell(world)
        make_sender().send_due()
        stop.set()
        thread.join(10)
    assert kept(world)[0][2:] == ("pending", 1, "it took too long to answer")


def test_nothing_is_sent_over_a_connection_that_is_made_after_the_end(
    world, heard, subscribe, make_sender, monkeypatch
):
    """Its name was found too late."""
    import socket
    import threading

    find = socket.getaddrinfo

    def find_late(*asked, **how):
        threading.Event().wait(2 * sender.LONGEST_S)
        return find(*asked, **how)

    monkeypatch.setattr(sender, "LONGEST_S", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", find_late)
    subscribe(heard.url)
    tell(world)
    make_sender().send_due()
    assert kept(world)[0][2:] == ("pending", 1, "it took too long to answer")
    assert heard.got == []


def test_an_answer_without_end_is_not_read(world, subscribe, send):
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def pour():
            peer, _ = listening.accept()
            with peer:
                try:
                    peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    while True:
                        peer.sendall(b"x" * 65_536)
                except OSError:
                    return

        thread = threading.Thread(target=pour, daemon=True)
        thread.start()
        subscribe(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        tell(world)
        send()
        thread.join(10)
    assert kept(world)[0][2:] == ("pending", 1, "its answer has no end")


@pytest.mark.parametrize(
    "said",
    [b"Content-Length: 100\r\n\r\n0123456789", b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"],
    ids=["cut short", "no chunks"],
)
def test_a_receiver_that_breaks_off_in_its_answer_holds_up_nobody_else(world, heard, subscribe, send, said):
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def break_off():
            peer, _ = listening.accept()
            with peer:
                peer.recv(65_536)
                peer.sendall(b"HTTP/1.1 200 OK\r\n" + said)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(65_536):
                    pass

        thread = threading.Thread(target=break_off, daemon=True)
        thread.start()
        subscribe(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        subscribe(heard.url)
        tell(world)
        send()
        thread.join(10)
    assert kept(world)[0][2:] == ("pending", 1, "its answer broke off")
    assert heard.sequences() == [1]


def test_an_address_on_which_the_library_chokes_holds_up_nobody_else(world, heard, subscribe, send, caplog):
    label = "in-the-url-" + "x" * 60  # no DNS label is so long, which urllib3 says by an error of its own
    subscribe(f"https://{label}.example.org/")
    subscribe(heard.url)
    tell(world)
    send()
    assert kept(world)[0][2:] == ("pending", 1, "it cannot be asked (LocationParseError)")
    assert heard.sequences() == [1]
    assert "in-the-url" not in caplog.text


def test_a_receiver_behind_tls_is_verified(world, subscribe, make_sender, tmp_path):
    import ssl

    from tests.certificates import Authority

    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("receiver"))
    with receiver(context) as made:
        subscribe(made.url)
        tell(world)
        make_sender().send_due()
        assert (made.got, kept(world)[0][4]) == ([], "its certificate is not believed")
        world.clock.step(seconds=5)
        make_sender(ca_file=str(authority.file)).send_due()
        assert made.sequences() == [1]


# --- who sends -------------------------------------------------------------------------------------------


def test_a_process_that_lost_the_lease_notes_nothing_and_the_next_sends_the_same_again(
    world, heard, subscribe, make_sender, config, clock, make_signer
):
    """Killed, or paused for too long, between the answer and the note of it."""
    first, second = (
        Jobs(config, clock=clock, shared_now=lambda _: None, signer=make_signer()) for _ in range(2)
    )
    subscribe(heard.url)
    tell(world)
    first.fence = _take(first, clock)

    def take_over():
        heard.hook = None
        clock.now += config.lease
        second.fence = _take(second, clock)

    heard.hook = take_over
    with pytest.raises(LostLeaseError):
        first.sender().send_due()
    assert states(world) == ["pending"]
    second.sender().send_due()
    assert (states(world), len(heard.got), len(set(heard.ids()))) == (["sent"], 2, 1)
    assert heard.got[0][1] == heard.got[1][1]
    for one in (first, second):
        one.close()


def _take(jobs, clock):
    with jobs.sessions.write() as session:
        return take_lease(session, jobs.holder, clock(), jobs.config.lease)


def test_a_process_without_the_lease_sends_nothing(world, heard, subscribe, make_sender):
    subscribe(heard.url)
    tell(world)
    make_sender(leads=lambda: False).send_due()
    assert heard.got == []


def test_no_transaction_is_open_while_a_receiver_is_waited_for(world, heard, subscribe, send, sessions):
    subscribe(heard.url)
    tell(world)
    seen = []

    def write_meanwhile():
        with sessions.write() as session:  # would wait for a writer, and fail
            subscriptions.find(session, 1)
            seen.append(sessions.engine.pool.checkedout())

    heard.hook = write_meanwhile
    send()
    assert seen == [1]


# --- secrets ---------------------------------------------------------------------------------------------


def test_no_secret_is_in_the_database_the_log_or_an_answer(
    world, heard, subscribe, send, sign_in, sessions, vault, caplog
):
    caplog.set_level(logging.DEBUG)
    show_logs("debug")  # as the processes do
    call = sign_in("admin")
    asked = {"json": {"url": heard.url, "events": ["*"]}, "headers": {"Idempotency-Key": "once"}}
    made = call("POST", "/webhooks", **asked).json
    assert call("POST", "/webhooks", **asked).json == {**made, "secret": None}
    rotation = {"json": {}, "headers": {"Idempotency-Key": "twice"}}
    turned = call("POST", f"/webhooks/{made['id']}/rotate", **rotation).json
    heard.answers = [500]
    tell(world)
    send()
    raw = [b64decode(said["secret"].removeprefix("whsec_")) for said in (made, turned)]
    forms = [form for secret in raw for form in (secret.hex(), b64encode(secret).decode())]
    forms += [vault.key().hex()]
    answers = [
        call("GET", path).get_data(as_text=True)
        for path in ("/webhooks", "/webhooks/1", "/audit", "/webhooks/1/deliveries")
    ]
    kept_texts = "\n".join(everything(sessions))
    for form in forms:
        assert form not in kept_texts
        assert form not in caplog.text
        assert not any(form in answer for answer in answers)
    assert "in-the-url" not in caplog.text
    assert "in-the-url" not in answers[2], "readers see the audit log"


def test_headers_that_cannot_be_read_put_no_url_into_the_log(world, heard, subscribe, send, caplog):
    caplog.set_level(logging.DEBUG)
    show_logs("debug")  # as the processes do
    subscribe(heard.url)
    heard.headers = {"X-Fine": "1\r\nno header at all"}
    tell(world)
    send()
    assert states(world) == ["sent"]
    assert "in-the-url" not in caplog.text


def test_a_key_that_is_gone_or_another_signs_nothing_and_says_so(world, heard, subscribe, send, config):
    subscribe(heard.url)
    tell(world)
    config.webhook_key.write_text("0" * 64 + "\n")
    send()
    assert (heard.got, kept(world)[0][4][:9]) == ([], "not sent:")
    config.webhook_key.unlink()
    world.clock.step(seconds=5)
    send()
    assert heard.got == []
    assert states(world) == ["pending"]


def test_the_key_is_for_its_owner_alone(subscribe, heard, vault):
    subscribe(heard.url)
    assert vault.place.stat().st_mode & 0o777 == 0o600
    vault.place.chmod(0o644)
    with pytest.raises(RelfleetError, match="key of webhooks"):
        vault.key()


# --- what may be added -----------------------------------------------------------------------------------


def test_the_address_is_looked_at_before_anything_is_sent(world, heard, subscribe, make_sender, monkeypatch):
    def refuse(address):
        raise PermissionError(address)

    monkeypatch.setattr(sender, "refuse_peer", refuse)
    subscribe(heard.url)
    tell(world)
    make_sender().send_due()
    assert (heard.got, states(world)) == ([], ["pending"])


# --- when ------------------------------------------------------------------------------------------------


def test_what_was_sent_long_ago_goes_and_what_waits_stays(
    world, heard, subscribe, send, sessions, blobs, config, vault
):
    number, _ = subscribe(heard.url)
    world.call(subscriptions.rotate, vault, number, timedelta(hours=1))
    tell(world)
    send()
    world.clock.step(days=31)
    tell(world)
    pruner = Pruner(sessions, blobs, config.repository, config.retention)
    while pruner.step(world.clock(), lambda session: None):
        pass
    assert [(row[0], row[2]) for row in kept(world)] == [(2, "pending")]
    with sessions.read() as session:
        assert [secret.until for secret in session.scalars(select(WebhookSecret))] == [None]


# --- people ----------------------------------------------------------------------------------------------


def test_admins_alone_see_and_change_webhooks_and_each_deed_is_audited(sign_in, heard, sessions):
    for role in ("reader", "operator", "releaser"):
        assert sign_in(role)("GET", "/webhooks").status_code == 403
    call = sign_in("admin")
    made = call("POST", "/webhooks", json={"url": heard.url, "events": ["*"]})
    assert (made.status_code, made.json["secrets"]) == (201, [{"until": None}])
    one = f"/webhooks/{made.json['id']}"
    assert "secret" not in call("GET", one).json
    assert call("POST", f"{one}/test", json={}).status_code == 202
    assert call("POST", f"{one}/rotate", json={}).status_code == 200
    assert call("POST", f"{one}/retry", json={}).json["again"] == 0
    assert call("DELETE", one).status_code == 204
    assert call("GET", one).status_code == 404
    with sessions.read() as session:
        done = session.scalars(select(AuditEntry.action).order_by(AuditEntry.id)).all()
        assert session.scalars(select(WebhookDelivery)).all() == []
    assert [action for action in done if action.startswith("webhook.")] == [
        "webhook.add",
        "webhook.test",
        "webhook.rotate",
        "webhook.retry",
        "webhook.remove",
    ]


def test_deliveries_are_shown_a_page_at_a_time(sign_in, world, heard, subscribe, send):
    subscribe(heard.url)
    for _ in range(5):
        tell(world)
    call = sign_in("admin")
    first = call("GET", "/webhooks/1/deliveries?limit=3").json
    second = call("GET", f"/webhooks/1/deliveries?limit=3&after={first['next']}").json
    assert [row["sequence"] for row in first["items"] + second["items"]] == [5, 4, 3, 2, 1]
    assert second["next"] is None
    assert call("GET", "/webhooks/1/deliveries?state=sent").json["items"] == []


def test_the_commands_from_the_first_to_the_last(
    world, app, token, tmp_path, monkeypatch, capsys, heard, send
):
    with desk_of(app, token, tmp_path, monkeypatch, capsys, role="admin") as at:
        code, secret, _ = at.run("webhook", "add", heard.url, "--events", "rollout.*,release.published")
        assert (code, secret[:6]) == (0, "whsec_")
        assert at.run("webhook", "add", "http://ops.example.org/", "--events", "*")[0] == 2
        tell(world)
        heard.hook = None
        assert send() == 1
        assert is_signed(*heard.got[0], secret.strip())
        (row,) = at.json("webhook", "deliveries", "1")
        assert (row["state"], row["answer"]) == ("sent", "200")
        assert "release.published" in at.run("webhook", "deliveries", "1")[1]
        assert "1" in at.run("webhook", "list")[1]
        shown = at.run("webhook", "show", "1")[1]
        assert "for ever" in shown
        code, out, _ = at.run("webhook", "rotate", "1", "--keep", "1h", "--out", "new.secret")
        assert (code, out) == (0, "")
        assert (tmp_path / "desk" / "new.secret").stat().st_mode & 0o777 == 0o600
        code, _, err = at.run("--timeout", "0.1", "webhook", "test", "1")
        assert (code, "has not been tried yet" in err) == (8, True)
        send()
        assert heard.types()[-1] == "webhook.test"
        assert at.run("webhook", "remove", "1")[0] == 2, "it asks"
        assert at.run("--yes", "--json", "webhook", "remove", "1")[:2] == (
            0,
            '{\n  "id": 1,\n  "removed": true\n}\n',
        )
        assert at.run("webhook", "show", "1")[0] == 7


def test_an_idle_outbox_costs_one_read_and_no_write(world, heard, subscribe, make_sender, sessions):
    subscribe(heard.url)
    sending = make_sender()
    said = []
    event.listen(sessions.engine, "before_cursor_execute", lambda *call: said.append(call[2]))
    sending.send_due()
    assert len([text for text in said if text != "BEGIN"]) == 1
