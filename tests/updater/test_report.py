"""What an agent learns of its standing from the answers to its reports."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from agent_core import wire
from agent_core.errors import NotAllowedError
from agent_core.layout import Layout
from tests.http_origin import Origin, Status
from updater import identity as identities
from updater import poll, report
from updater.device import Device
from updater.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

JSON = {"Content-Type": "application/json"}
PROBLEM = {"Content-Type": "application/problem+json"}


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as origin:
        yield origin


@pytest.fixture
def device(tmp_path: Path, origin: Origin) -> Device:
    layout = Layout(tmp_path)
    layout.make()
    identities.make_key(layout)
    identities.save(layout, Identity(origin.url, "warehouse-agent", "web-17", "any", "eu-web"))
    return Device.load(tmp_path)


def answering(origin: Origin, answer: wire.ReportAnswer) -> None:
    origin.answer("POST", "/api/v1/report", Status(200, JSON, json.dumps(answer.to_json()).encode()))


def refusing(origin: Origin, status: int, reason: str) -> None:
    body = wire.Problem(status, "no", reason=reason).to_json()
    origin.answer("POST", "/api/v1/report", Status(status, PROBLEM, json.dumps(body).encode()))


def known(device: Device) -> tuple[str | None, str]:
    kept = identities.load(device.layout)
    return kept.cohort, kept.standing


def test_an_agent_learns_that_it_waits_and_that_it_was_accepted(origin: Origin, device: Device) -> None:
    answering(origin, wire.ReportAnswer(None, 0, pending=True))
    device, _ = report.send_signed(device)
    assert known(device) == (None, "pending")
    answering(origin, wire.ReportAnswer("eu-web", 0))
    report.send_signed(device)
    assert known(device) == ("eu-web", "")


def test_a_retired_agent_keeps_it_and_takes_no_directive(origin: Origin, device: Device) -> None:
    refusing(origin, 403, "retired")
    with pytest.raises(NotAllowedError):
        report.send_signed(device)
    assert known(device) == (None, "retired")


def test_the_check_that_hears_of_it_already_goes_by_it(origin: Origin, device: Device) -> None:
    refusing(origin, 403, "retired")
    assert poll.tell(device).identity.cohort is None


@pytest.mark.parametrize(("status", "reason"), [(401, "bad-signature"), (403, "scope"), (422, "retired")])
def test_no_other_refusal_changes_what_an_agent_is(
    origin: Origin, device: Device, status: int, reason: str
) -> None:
    refusing(origin, status, reason)
    with pytest.raises(Exception, match="no"):
        report.send_signed(device)
    assert known(device) == ("eu-web", "")
