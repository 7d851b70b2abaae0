"""What webhooks go by: which events there are, how they are signed, who may be told, and when; pure."""

from __future__ import annotations

from base64 import b64decode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import release_server.rollout as brain
from agent_core.errors import UsageError
from release_server.webhooks import events, schedule, signature, subscriptions
from release_server.webhooks.sender import refuse_peer


def test_every_transition_that_is_told_is_one_that_a_rollout_makes():
    text = Path(brain.__file__).read_text()
    assert all(f'"{name}"' in text for name in events.OF_ROLLOUTS)


def test_the_signature_is_the_one_of_the_specification():
    """The example of the specification's own libraries."""
    key = b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    at = datetime.fromtimestamp(1614265330, UTC)
    made = signature.headers("msg_p5jXN8AQM9LWM0D4loKWxJek", at, b'{"test": 2432232314}', [key])
    assert made["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    ("url", "plain", "why"),
    [
        ("ftp://ops.example.org/", False, None),
        ("https://", False, None),
        ("https://ops.example.org:0/", False, None),
        ("https://ops.example.org:x/", False, None),
        ("https://ops.example.org/\n", False, None),
        ("https://ops.example.org/é", False, None),
        ("https://ada:secret@ops.example.org/", False, "a password"),
        ("https://ops.example.org/#x", False, "fragment"),
        ("http://ops.example.org/", False, "read what is told"),
    ],
)
def test_a_url_that_cannot_be_asked_safely_is_refused(url, plain, why):
    with pytest.raises(UsageError) as refused:
        subscriptions.check_url(url, plain=plain)
    assert why is None or why in refused.value.why


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("https://ops.example.org/a?b=c", False),
        ("http://127.0.0.1:80/", False),
        ("http://localhost/", False),
        ("http://ops.example.org/", True),
    ],
)
def test_a_url_that_can_be_asked_is_taken(url, plain):
    subscriptions.check_url(url, plain=plain)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "fe80::1%eth0",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "0.0.0.0",
        "::",
        "224.0.0.1",
    ],
)
def test_a_name_that_leads_to_the_clouds_own_services_is_not_followed(address):
    with pytest.raises(OSError, match="no address of a receiver"):
        refuse_peer(address)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "192.0.2.1", "64:ff9b::c000:201", "2001:4860::1"]
)
def test_a_receiver_on_this_host_or_behind_nat64_is_one(address):
    refuse_peer(address)


@pytest.mark.parametrize("wanted", [["rollout"], ["rollout.exploded"], ["webhook.test"], []])
def test_an_event_that_never_happens_cannot_be_asked_for(wanted):
    with pytest.raises(UsageError) as refused:
        events.check_wanted(wanted)
    assert refused.value.reason == "bad-event"


def test_pauses_double_up_to_an_hour_and_are_spread():
    middle = [schedule.pause(count, 1.0).total_seconds() for count in range(1, 13)]
    assert middle == [5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600]
    assert schedule.pause(1, 0.0) == timedelta(seconds=2.5)
    assert schedule.pause(10**9, 1.0) == schedule.MOST


def test_a_receiver_may_ask_for_a_longer_pause_but_not_for_ever():
    asked = schedule.answer_of(429, "120")
    assert (asked.took, asked.refused) == (False, False)
    assert schedule.pause(1, 0.0, asked.later) == timedelta(seconds=120)
    assert schedule.pause(1, 0.0, schedule.answer_of(503, "9" * 400).later) == schedule.MOST
    assert schedule.answer_of(503, "Wed, 21 Oct 2026 07:28:00 GMT").later is None
