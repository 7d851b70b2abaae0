"""Floors, revocations and renewals, typed by a release manager against a real server."""

import json

import pytest

from agent_core.errors import ConflictError, Exit, NotFoundError
from agent_core.wire import Policy
from release_server.publish import policy as rules
from tests.release_server.publish.house import PRODUCT, Desk, ceremony_at, serve


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("house") / "server") as running:
        yield running


@pytest.fixture(scope="module")
def desk(house, tmp_path_factory):
    """A release manager who holds every key; the ceremony is not brought to the server yet."""
    desk = Desk(house, tmp_path_factory.mktemp("desks") / "ada", role="admin")
    ceremony_at(desk, house)
    return desk


@pytest.fixture
def ada(desk, make_bundle, request):
    """The same with a product of this test's own, of which 1.0.0 and 1.1.0 are published."""
    product = f"{PRODUCT}-{request.node.name[5:40].strip('_').replace('_', '-')}"
    desk.environ["RELFLEET_PRODUCT"] = product
    code, _, said = desk("key", "gen")
    assert code == Exit.DONE, said
    for version in ("1.0.0", "1.1.0"):
        archive = make_bundle(version, product=product, content=version.encode())
        code, _, said = desk("push", archive, "--wait")
        assert code == Exit.DONE, said
    return desk


def test_a_floor_is_signed_shown_and_never_falls(ada):
    assert ada.json("policy", "show")["floor"] is None
    sent = ada.json("policy", "set", "--floor", "1.1.0", "--yes")
    assert (sent["state"], sent["policy"]["floor_seq"]) == ("published", 2)
    assert [entry["version"] for entry in sent["reach"]] == ["1.0.0"]
    shown = ada.json("policy", "show")
    assert (shown["floor"], shown["forbidden"]) == ({"seq": 2, "version": "1.1.0"}, ["1.0.0"])
    assert ada.json("policy", "set", "--floor", "1.1.0")["state"] == "already"
    code, _, said = ada("policy", "set", "--floor", "1.0.0", "--yes")
    assert code == Exit.CONFLICT
    assert "never fall" in said


def test_a_revocation_says_who_runs_the_version_and_what_to_type(ada):
    assert ada("cohort", "create", "main", "--match", "", "--release", "1.1.0")[0] == Exit.DONE
    code, _, said = ada("policy", "revoke", "1.1.0")
    assert code == Exit.USAGE
    assert "0 agent(s) run that now" in said
    assert ada.json("policy", "show")["revoked"] == []
    code, _, said = ada("policy", "revoke", "1.1.0", "--yes")
    assert code == Exit.DONE
    assert "release rollout start NEWER --cohort main" in said
    assert ada.json("policy", "show")["forbidden"] == ["1.1.0"]
    assert ada.json("policy", "revoke", "1.1.0", "--undo")["state"] == "published"
    assert ada.json("policy", "show")["revoked"] == []


def test_whoever_puts_a_barrier_out_of_reach_is_warned_first(ada, make_bundle):
    product = ada.environ["RELFLEET_PRODUCT"]
    wall = make_bundle("1.2.0", product=product, platform="linux-riscv64", content=b"wall")
    code, _, said = ada("push", wall, "--barrier", "--wait")
    assert (code, "1.2.0 is a barrier without a bundle for" in said) == (Exit.DONE, True), said
    code, _, said = ada("policy", "revoke", "1.2.0")
    assert (code, "warning: 1.2.0 is a barrier, and hosts" in said) == (Exit.USAGE, True), said
    code, _, said = ada("policy", "revoke", "1.1.0")
    assert (code, "is a barrier" in said) == (Exit.USAGE, False), said
    code, _, said = ada("policy", "set", "--floor", "1.2.0", "--yes")
    assert (code, "is a barrier" in said) == (Exit.DONE, False), said


def test_a_fleet_file_says_what_release_keys_have_to_sign_and_signs_nothing(ada, tmp_path):
    file = tmp_path / "fleet.toml"
    file.write_text('[policy]\nfloor = "1.1.0"\nrevoked = ["1.0.0"]\n')
    wanted = ["release policy set --floor 1.1.0", "release policy revoke 1.0.0"]
    assert ada.json("diff", "-f", file)["policy"] == wanted
    assert ada("diff", "-f", file, "--detailed-exitcode")[0] == 10
    code, _, said = ada("apply", "-f", file, "--yes")
    assert (code, wanted[0] in said) == (Exit.UNREACHABLE, True)
    assert ada.json("policy", "show")["floor"] is None
    assert ada("policy", "set", "--floor", "1.1.0", "--yes")[0] == Exit.DONE
    assert ada("policy", "revoke", "1.0.0", "--yes")[0] == Exit.DONE
    assert ada("apply", "-f", file)[0] == Exit.DONE
    file.write_text("[policy]\n")
    assert ada.json("diff", "-f", file)["policy"] == ["release policy revoke --undo 1.0.0"]


def test_a_policy_names_only_published_versions(ada):
    for words in (("set", "--floor", "9.9"), ("revoke", "9.9")):
        assert ada("policy", *words, "--yes")[0] == Exit.NOT_FOUND


def test_renewing_changes_nothing_but_the_version_and_the_expiry(ada, house):
    version = ada.json("policy", "show")["targets_version"]
    sent = ada.json("renew")
    assert (sent["state"], sent["targets_version"]) == ("published", version + 1)
    metadata = house.data / "repository" / "metadata"
    before, after = (
        json.loads((metadata / f"{number}.targets.json").read_bytes()) for number in (version, version + 1)
    )
    for kept in ("targets", "delegations"):
        assert after["signed"][kept] == before["signed"][kept]
    assert after["signed"]["expires"] >= before["signed"]["expires"]


def test_a_yanked_release_is_not_given_to_a_cohort_until_it_is_offered_again(ada):
    assert ada("cohort", "create", "main", "--match", "", "--release", "1.0.0")[0] == Exit.DONE
    assert ada("rollout", "start", "1.1.0", "--cohort", "main")[0] == Exit.DONE
    code, _, said = ada("yank", "1.1.0", "--reason", "leaks", "--yes")
    assert code == Exit.DONE, said
    assert ada.json("show", "1.1.0")["yanked"]["reason"] == "leaks"
    status = ada.json("rollout", "status", "r-1")
    assert (status["state"], status["reason"]) == ("paused", "manual")
    for words in (
        ("rollout", "resume", "r-1"),
        ("cohort", "pin", "main", "1.1.0", "--reason", "x", "--yes"),
        ("yank", "1.1.0", "--reason", "again", "--yes"),
    ):
        code, _, said = ada(*words)
        assert (code, "was yanked" in said) == (Exit.CONFLICT, True), said
    assert ada("yank", "1.1.0", "--undo", "--reason", "fixed")[0] == Exit.DONE
    assert ada("rollout", "resume", "r-1")[0] == Exit.DONE


# --- pure ---


def test_a_floor_rises_and_stays():
    assert rules.with_floor(Policy(), 3, "3") == Policy(3)
    assert rules.with_floor(Policy(3), 3, "3") == Policy(3)
    with pytest.raises(ConflictError) as caught:
        rules.with_floor(Policy(3), 2, "2")
    assert caught.value.reason == "below-floor"


def test_revocations_are_a_set():
    held = rules.with_revoked(Policy(1, (5,)), [2, 5])
    assert held == Policy(1, (2, 5))
    assert rules.without_revoked(held, [2, 7]) == Policy(1, (5,))


def test_a_version_that_was_never_published_has_no_seq():
    with pytest.raises(NotFoundError):
        rules.seq_of({}, "demo", "1.0")
