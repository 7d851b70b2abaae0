"""Every wire message: its golden form, what of it is refused and in which words, and the round trip."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_core import wire
from agent_core.errors import MalformedError
from agent_core.wire import (
    AttemptState,
    DeltaFacts,
    Directive,
    EnrollAnswer,
    EnrollRequest,
    Getter,
    KeyChange,
    Mode,
    Phase,
    Policy,
    Problem,
    ReleaseFacts,
    Report,
    ReportAnswer,
    Transition,
    Window,
)

unhurried = settings(deadline=None)
"""A busy machine is no failure."""

GOLDEN = Path(__file__).parents[1] / "golden"

DIGEST = "3f0a1b2c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c5d6e7f8"

TRIAL = Transition(
    number=11,
    at="2026-01-31T11:58:30Z",
    version="1.5.0",
    digest="3f0a1b2c4d5e",
    salt="9c1f0e6a7b2d4c35",
    state=AttemptState.TRIAL,
)
ROLLED_BACK = Transition(
    number=12,
    at="2026-01-31T12:00:00Z",
    version="1.5.0",
    digest="3f0a1b2c4d5e",
    salt="9c1f0e6a7b2d4c35",
    state=AttemptState.ROLLED_BACK,
    reason="boots-used-up",
    detail="3 boots, none lived for 60 s",
)

VALUES: dict[str, Any] = {
    "lease_terms": wire.LeaseTerms("site", None, 1_000),
    "lease_request": wire.LeaseRequest("1.5.0"),
    "lease_answer": wire.LeaseAnswer(granted=False, detail="2 of site berlin are at it", again_s=30),
    "budget_terms": wire.BudgetTerms("site", 2_000_000, 4),
    "share_request": wire.ShareRequest("1.5.0", 800_000),
    "share_answer": wire.ShareAnswer(500_000, 300),
    "share_answer_later": wire.ShareAnswer(
        0, detail="site berlin downloads with 2000 kB/s of 2000 kB/s (4 at it)", again_s=60
    ),
    "delta_facts": DeltaFacts("1.4.2", "ab" * 32, "cd" * 32),
    "release_facts": ReleaseFacts(
        product="warehouse-agent",
        version="1.5.0",
        seq=7,
        platform="linux-x86_64-cp311",
        index_sha256=DIGEST,
        index_length=48_213,
        unpacked=9_437_184,
        files=412,
        gates=("canary", "stable"),
        upgrade_from_seq=3,
        barrier=True,
        min_launcher=1,
        notes="Reads the new scanner protocol.",
    ),
    "policy": Policy(floor_seq=4, revoked_seq=(5, 6)),
    "window": Window(days=("sat", "sun"), start="22:30", end="04:00", zone="Europe/Berlin"),
    "directive": Directive(
        product="warehouse-agent",
        cohort="eu-web",
        release="1.5.0",
        base="1.4.2",
        progress=1_000,
        salt="9c1f0e6a7b2d4c35",
        revision=31,
        window=Window(("mon", "tue", "wed", "thu"), "09:00", "16:30", "Europe/Berlin"),
        lease=wire.LeaseTerms("rack", 2),
        budget=wire.BudgetTerms("site", 500_000),
        splay_s=120,
        retry_epoch=2,
    ),
    "directive_before_any_release": Directive(
        product="warehouse-agent",
        cohort="default",
        release=None,
        base=None,
        progress=0,
        salt="",
        revision=1,
        mode=Mode.SUSPENDED,
    ),
    "enroll_request": EnrollRequest(
        product="warehouse-agent",
        name="web-17",
        public_key=DIGEST,
        platform="linux-x86_64-cp311",
        gate="canary",
        labels={"region": "eu", "tier": "web"},
    ),
    "enroll_answer": EnrollAnswer("web-17", "eu-web"),
    "enroll_answer_without_cohort": EnrollAnswer("web-17", None),
    "enroll_answer_pending": EnrollAnswer("web-17", None, pending=True),
    "key_change": KeyChange(DIGEST, DIGEST * 2),
    "transition": ROLLED_BACK,
    "report": Report(
        agent_id="web-17",
        product="warehouse-agent",
        version="1.4.2",
        digest="a1b2c3d4e5f6",
        phase=Phase.IDLE,
        platform="linux-x86_64-cp311",
        reason="skipped",
        detail="1.5.0 failed here before",
        labels={"region": "eu", "tier": "web"},
        inventory={
            "os": "linux",
            "arch": "x86_64",
            "python": "3.11.4",
            "kernel": "6.1.0-13-amd64",
            "distro": "debian-12",
        },
        figures={"cpu": 1.5, "rss": 52_428_800, "uptime_s": 3600},
        transitions=(TRIAL, ROLLED_BACK),
    ),
    "report_heartbeat": Report(
        agent_id="web-18",
        product="warehouse-agent",
        version="",
        digest="",
        phase=Phase.DOWNLOADING,
        platform="linux-aarch64",
        reason="first-install",
        held=True,
    ),
    "report_answer": ReportAnswer("eu-web", 12, "c2Vzc2lvbi10b2tlbg", 3_600),
    "report_answer_without_session": ReportAnswer(None, 0),
    "report_answer_pending": ReportAnswer(None, 3, "c2Vzc2lvbi10b2tlbg", 3_600, pending=True),
    "problem": Problem(
        status=409,
        title="the cohort is frozen",
        detail="eu-web is frozen until 2026-02-01T06:00:00Z",
        reason="conflict",
        then="release cohort unfreeze eu-web",
    ),
}


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def parse(name: str, body: object) -> Any:
    return type(VALUES[name]).from_json(body, name)


@pytest.mark.parametrize("name", VALUES)
def test_the_golden_form_reads_as_the_value(name: str) -> None:
    assert parse(name, golden(name)) == VALUES[name]


@pytest.mark.parametrize("name", VALUES)
def test_the_value_writes_the_golden_form(name: str) -> None:
    assert VALUES[name].to_json() == golden(name)


def test_every_message_of_the_module_has_a_golden_file_and_every_file_a_value() -> None:
    messages = {kind for kind in vars(wire).values() if isinstance(kind, type) and hasattr(kind, "from_json")}
    assert messages == {type(value) for value in VALUES.values()}
    assert {path.stem for path in GOLDEN.glob("*.json")} - {"buckets"} == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_keys_of_a_newer_version_are_ignored(name: str) -> None:
    assert parse(name, golden(name) | {"key_of_tomorrow": [1, {"x": None}]}) == VALUES[name]


def test_a_release_that_is_no_barrier_says_nothing_of_it() -> None:
    assert "barrier" not in replace(VALUES["release_facts"], barrier=False).to_json()


def test_what_an_older_end_leaves_out_gets_its_default() -> None:
    newer = {"gates", "upgrade_from_seq", "min_launcher", "notes", "barrier"}
    older = {key: value for key, value in golden("release_facts").items() if key not in newer}
    facts = parse("release_facts", older)
    assert (facts.gates, facts.upgrade_from_seq, facts.min_launcher, facts.notes) == ((), 0, 1, "")
    assert not facts.barrier
    required = {"schema", "product", "cohort", "progress", "salt", "revision"}
    directive = {key: value for key, value in golden("directive").items() if key in required}
    assert parse("directive", directive) == Directive(
        "warehouse-agent", "eu-web", None, None, 1_000, "9c1f0e6a7b2d4c35", 31
    )
    assert parse("policy", {"schema": 1}) == Policy()


# --- refusals --------------------------------------------------------------------------------------------

MISSING = object()
NOT_TEXT = (7, True, ["x"], {})
NOT_NUMBER = ("7", True, 1.5, [])
NAMES = ("", "Upper", "-dash", ".dot", "..", "a/b", "a b", "name\n", "x" * 65, "ä", *NOT_TEXT)
VERSIONS = ("", "v1.0", "1.0/..", "1.0 0", "1.0\n", "1" * 65, *NOT_TEXT)
PLATFORMS = ("", "Linux", "linux/x86", "linux x86", *NOT_TEXT)
AGENT_IDS = ("", ".hidden", "a/b", "a b", "x" * 129, "web-17\n", *NOT_TEXT)
DIGESTS = ("", DIGEST[:-1], DIGEST + "0", DIGEST.upper(), "g" * 64, *NOT_TEXT)
TEXTS = ("x" * 2_001, "nul \0 inside", "half a pair \ud800", *NOT_TEXT)
NOTHING_TEXTS = (*TEXTS, None)
COUNTS = (-1, 2**53 + 1, 10**4_200, *NOT_NUMBER)
SCHEMAS = (MISSING, 0, 2, None, *NOT_NUMBER)
CLOCK_TIMES = (MISSING, "24:00", "9:00", "09:60", "09:00:00", "", *NOT_TEXT)
LABELS = (
    [],
    None,
    {"Upper": "x"},
    {"": "x"},
    {"k" * 64: "x"},
    {"a b": "x"},
    {"key": 7},
    {"key": None},
    {"key": "v" * 257},
    {"key": "nul\0"},
    {f"k{number}": "x" for number in range(65)},
)
FLAGS = (0, 1, "true", None, [])

REFUSED: dict[str, dict[str, tuple[object, ...]]] = {
    "release_facts": {
        "schema": SCHEMAS,
        "product": (MISSING, None, *NAMES),
        "version": (MISSING, None, *VERSIONS),
        "seq": (MISSING, 0, None, *COUNTS),
        "platform": (MISSING, None, *PLATFORMS),
        "index": (MISSING, None, [], "x"),
        "index.sha256": (MISSING, None, *DIGESTS),
        "index.length": (MISSING, 1, 64 * 2**20 + 1, None, *NOT_NUMBER),
        "unpacked": (MISSING, None, *COUNTS),
        "files": (MISSING, None, *COUNTS),
        "gates": ("canary", {}, None, [1], [None], ["x" * 2_001], ["\0"], ["g"] * 33),
        "upgrade_from_seq": (None, *COUNTS),
        "min_launcher": (None, *COUNTS),
        "notes": NOTHING_TEXTS,
        "barrier": FLAGS,
    },
    "delta_facts": {
        "schema": SCHEMAS,
        "from_version": (MISSING, None, *VERSIONS),
        "from_sha256": (MISSING, None, *DIGESTS),
        "to_sha256": (MISSING, None, *DIGESTS),
    },
    "budget_terms": {
        "scope": (MISSING, None, "", "Site", "a b", *NOT_TEXT),
        "bytes_per_s": (MISSING, None, 0, 4_095, 2**31, *COUNTS),
        "at_once": (None, 0, 489, 1_001, *COUNTS),
    },
    "share_request": {
        "schema": SCHEMAS,
        "version": (MISSING, None, *VERSIONS),
        "wants_bps": (None, *COUNTS),
        "done": FLAGS,
    },
    "share_answer": {
        "schema": SCHEMAS,
        "rate_bps": (MISSING, None, 2**31, *COUNTS),
        "lasts_s": (None, 86_401, *COUNTS),
        "detail": NOTHING_TEXTS,
        "again_s": (None, 86_401, *COUNTS),
    },
    "policy": {
        "schema": SCHEMAS,
        "floor_seq": (None, *COUNTS),
        "revoked_seq": (None, {}, "5", [-1], [True], [1.0], ["5"], [None], [1] * 1_001),
    },
    "window": {
        "days": (MISSING, None, [], "mon", ["monday"], ["mon", 1], ["mon"] * 8),
        "from": CLOCK_TIMES,
        "to": CLOCK_TIMES,
        "zone": (MISSING, *NOTHING_TEXTS),
    },
    "directive": {
        "schema": SCHEMAS,
        "product": (MISSING, None, *NAMES),
        "cohort": (MISSING, None, *NAMES),
        "release": VERSIONS,
        "base": VERSIONS,
        "progress": (MISSING, None, 10_001, *COUNTS),
        "salt": (MISSING, *NOTHING_TEXTS),
        "revision": (MISSING, None, *COUNTS),
        "rollback": FLAGS,
        "mode": ("on", "", "ENABLED", None, 1),
        "window": ([], "always", {"days": ["mon"]}),
        "lease": ([], 2, "rack"),
        "budget": ([], 2, "site", {"scope": "site"}),
        "splay_s": (None, 7 * 86_400 + 1, *COUNTS),
        "poll_s": (None, 0, 86_401, *COUNTS),
        "report_s": (None, 0, 86_401, *COUNTS),
        "retry_epoch": (None, *COUNTS),
    },
    "enroll_request": {
        "schema": SCHEMAS,
        "product": (MISSING, None, *NAMES),
        "name": (MISSING, None, *AGENT_IDS),
        "public_key": (MISSING, None, *DIGESTS),
        "platform": (MISSING, None, *PLATFORMS),
        "gate": NOTHING_TEXTS,
        "labels": LABELS,
    },
    "enroll_answer": {"agent_id": (MISSING, None, *AGENT_IDS), "cohort": NAMES, "pending": FLAGS},
    "key_change": {
        "schema": SCHEMAS,
        "public_key": (MISSING, None, *DIGESTS),
        "proof": (MISSING, None, *DIGESTS),
    },
    "transition": {
        "number": (MISSING, 0, None, *COUNTS),
        "at": (MISSING, *NOTHING_TEXTS),
        "version": (MISSING, None, *VERSIONS),
        "digest": NOTHING_TEXTS,
        "salt": NOTHING_TEXTS,
        "state": (MISSING, "", "done", "rolled back", None, 1),
        "reason": NOTHING_TEXTS,
        "detail": NOTHING_TEXTS,
    },
    "report": {
        "schema": SCHEMAS,
        "agent_id": (MISSING, None, *AGENT_IDS),
        "product": (MISSING, None, *NAMES),
        "version": NOTHING_TEXTS,
        "digest": NOTHING_TEXTS,
        "phase": (MISSING, "", "fetching", None, 3),
        "platform": (MISSING, None, *PLATFORMS),
        "reason": NOTHING_TEXTS,
        "detail": NOTHING_TEXTS,
        "held": FLAGS,
        "labels": LABELS,
        "inventory": LABELS,
        "figures": (
            [],
            None,
            {"rss": "12"},
            {"rss": None},
            {"up": True},
            {"cpu": float("nan")},
            {"cpu": float("inf")},
            {"rss": 10**400},
            {f"figure-{number}": 1 for number in range(65)},
        ),
        "transitions": ({}, "none", None, [7], [{}], [{"number": 1}], [0] * 201),
    },
    "report_answer": {
        "cohort": NAMES,
        "accepted": (MISSING, None, *COUNTS),
        "session": TEXTS,
        "session_s": (None, *COUNTS),
        "pending": FLAGS,
    },
    "problem": {
        "status": (MISSING, None, 399, 600, *NOT_NUMBER),
        "title": (MISSING, *NOTHING_TEXTS),
        "detail": NOTHING_TEXTS,
        "reason": NOTHING_TEXTS,
        "then": NOTHING_TEXTS,
    },
}


def shown(value: object) -> str:
    return "missing" if value is MISSING else (repr(value)[:24] or "empty")


CASES = [
    pytest.param(name, key, value, id=f"{name}.{key}={shown(value)}")
    for name, fields in REFUSED.items()
    for key, values in fields.items()
    for value in values
]


def spoiled(name: str, key: str, value: object) -> dict[str, Any]:
    body = copy.deepcopy(golden(name))
    holder, *rest = key.split(".")
    target, leaf = (body[holder], rest[0]) if rest else (body, holder)
    if value is MISSING:
        del target[leaf]
    else:
        target[leaf] = value
    return body


@pytest.mark.parametrize(("name", "key", "value"), CASES)
def test_what_does_not_fit_is_refused_by_the_path_of_its_key(name: str, key: str, value: object) -> None:
    with pytest.raises(MalformedError) as refusal:
        parse(name, spoiled(name, key, value))
    assert refusal.value.what.startswith(f"{name}.{key}")
    assert refusal.value.reason == "malformed"
    assert refusal.value.why
    assert len(str(refusal.value)) < 400, "a refusal does not repeat what a stranger sent at length"


@pytest.mark.parametrize("name", ["enroll_answer", "report_answer"])
def test_the_answer_of_a_server_without_approvals_is_read(name: str) -> None:
    old = {key: value for key, value in golden(name).items() if key != "pending"}
    assert type(VALUES[name]).from_json(old) == VALUES[name]


def test_the_refusals_above_cover_every_key_of_every_message() -> None:
    # These are written for other readers (RFC 9457 clients, people, captures); nothing here reads them.
    unread = {("problem", "type"), ("enroll_answer", "schema"), ("report_answer", "schema")}
    keys = {(name, key) for name in REFUSED for key in golden(name)}
    covered = {(name, key.split(".")[0]) for name, fields in REFUSED.items() for key in fields}
    assert keys - unread == covered


@pytest.mark.parametrize("body", [None, 7, "text", [], [{}], True], ids=repr)
@pytest.mark.parametrize("name", VALUES)
def test_a_message_is_an_object(name: str, body: object) -> None:
    with pytest.raises(MalformedError, match="is not an object"):
        parse(name, body)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (golden("directive") | {"progress": "all"}, "directive.progress is not acceptable: it is str"),
        (golden("directive") | {"progress": 20_000}, "20000 is not within 0 and 10000"),
        (golden("directive") | {"salt": 7}, "directive.salt is not acceptable: it is int"),
        (golden("directive") | {"mode": "on"}, "'on' is not one of enabled, suspended, disabled"),
        (golden("directive") | {"cohort": "EU"}, "'EU' does not have the form"),
        (golden("directive") | {"window": {}}, "directive.window.days is not acceptable: it is missing"),
        (golden("directive") | {"window": golden("window") | {"to": "noon"}}, "directive.window.to"),
    ],
    ids=["kind", "range", "number for text", "choice", "form", "nested missing", "nested form"],
)
def test_a_refusal_says_what_is_wrong(body: dict[str, Any], words: str) -> None:
    with pytest.raises(MalformedError, match=re.escape(words)):
        parse("directive", body)


def test_a_refusal_inside_a_list_names_the_place() -> None:
    body = golden("report")
    body["transitions"][1]["state"] = "sideways"
    with pytest.raises(MalformedError) as refusal:
        parse("report", body)
    assert refusal.value.what == "report.transitions[1].state is not acceptable"


@pytest.mark.parametrize("value", [-0.1, 10.5, float("nan"), "1", True, None, MISSING], ids=shown)
def test_a_number_outside_its_range_or_no_number_at_all_is_refused(value: object) -> None:
    mapping = {} if value is MISSING else {"ratio": value}
    with pytest.raises(MalformedError, match=r"^check\.ratio"):
        Getter(mapping, "check").number("ratio", high=10)


def test_a_number_may_be_whole_and_may_be_left_out() -> None:
    assert Getter({"ratio": 3}, "check").number("ratio") == 3.0
    assert Getter({}, "check").number("ratio", 1.5) == 1.5
    assert Getter({}, "check").number("ratio", None) is None


# --- round trips -----------------------------------------------------------------------------------------

names = st.from_regex(wire.NAME, fullmatch=True)
agent_ids = st.from_regex(wire.AGENT_ID, fullmatch=True)
versions = st.from_regex(wire.VERSION, fullmatch=True)
platforms = st.from_regex(wire.PLATFORM, fullmatch=True)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60)
counts = st.integers(0, 2**53)
labels = st.dictionaries(st.from_regex(wire.LABEL_KEY, fullmatch=True), texts, max_size=4)
clock_times = st.from_regex(wire.CLOCK_TIME, fullmatch=True)
budgets = st.builds(
    wire.BudgetTerms,
    st.sampled_from(["site", "rack"]),
    st.integers(10 * wire.LEAST_SHARE_BPS, wire.MOST_BPS),
    st.integers(1, 10),
)
windows = st.builds(
    Window,
    st.lists(st.sampled_from(wire.DAYS), min_size=1, unique=True).map(tuple),
    clock_times,
    clock_times,
    texts,
)
transitions = st.builds(
    Transition,
    st.integers(1, 2**53),
    texts,
    versions,
    texts,
    texts,
    st.sampled_from(AttemptState),
    texts,
    texts,
)

MESSAGES: list[st.SearchStrategy[Any]] = [
    st.builds(
        ReleaseFacts,
        names,
        versions,
        st.integers(1, 2**53),
        platforms,
        digests,
        st.integers(2, 64 * 2**20),
        counts,
        counts,
        st.lists(texts, max_size=3).map(tuple),
        counts,
        counts,
        texts,
    ),
    st.builds(DeltaFacts, versions, digests, digests),
    st.builds(Policy, counts, st.lists(counts, max_size=5).map(tuple)),
    windows,
    st.builds(
        Directive,
        product=names,
        cohort=names,
        release=st.none() | versions,
        base=st.none() | versions,
        progress=st.integers(0, wire.PROGRESS_FULL),
        salt=texts,
        revision=counts,
        rollback=st.booleans(),
        mode=st.sampled_from(Mode),
        window=st.none() | windows,
        lease=st.none()
        | st.builds(wire.LeaseTerms, st.sampled_from(["site", "rack"]), st.integers(1, 9), st.none()),
        budget=st.none() | budgets,
        splay_s=st.integers(0, 7 * 86_400),
        poll_s=st.integers(1, 86_400),
        report_s=st.integers(1, 86_400),
        retry_epoch=counts,
    ),
    budgets,
    st.builds(wire.ShareRequest, versions, counts, st.booleans()),
    st.builds(wire.ShareAnswer, st.integers(0, wire.MOST_BPS), st.integers(0, 86_400), texts),
    st.builds(EnrollRequest, names, agent_ids, digests, platforms, texts, labels),
    st.builds(KeyChange, digests, digests.map(lambda half: half * 2)),
    st.builds(EnrollAnswer, agent_ids, st.none() | names, st.booleans()),
    transitions,
    st.builds(
        Report,
        agent_ids,
        names,
        texts,
        texts,
        st.sampled_from(Phase),
        platforms,
        texts,
        texts,
        st.booleans(),
        labels,
        labels,
        st.dictionaries(texts, st.integers(-(2**53), 2**53) | st.floats(-1e18, 1e18), max_size=4),
        st.lists(transitions, max_size=3).map(tuple),
    ),
    st.builds(ReportAnswer, st.none() | names, counts, st.none() | texts, counts, st.booleans()),
    st.builds(Problem, st.integers(400, 599), texts, texts, texts, texts),
]


@unhurried
@given(message=st.one_of(MESSAGES))
def test_what_one_end_writes_the_other_reads_as_the_same_value(message: Any) -> None:
    written = json.dumps(message.to_json(), allow_nan=False)
    assert type(message).from_json(json.loads(written), "message") == message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@unhurried
@given(name=st.sampled_from(sorted(REFUSED)), place=st.integers(0, 30), value=json_values)
def test_whatever_stands_in_a_field_it_is_read_or_refused_and_nothing_else(
    name: str, place: int, value: object
) -> None:
    body = golden(name)
    key = sorted(body)[place % len(body)]
    body[key] = value
    try:
        message = parse(name, body)
    except MalformedError as refusal:
        assert refusal.what.startswith(name)  # noqa: PT017 - either outcome is right
    else:
        assert parse(name, message.to_json()) == message


# --- paths and signatures --------------------------------------------------------------------------------


def test_target_paths() -> None:
    assert wire.bundle_path("p", "1.0", "any") == "bundles/p/1.0/any.tar.zst"
    assert wire.index_path("p", "1.0", "any") == "bundles/p/1.0/any.index.json"
    assert wire.policy_path("p") == "policy/p.json"
    assert wire.directive_path("p", "eu-web") == "cohorts/p/eu-web.json"


@unhurried
@given(product=names, version=versions, platform=platforms, cohort=names)
def test_no_accepted_name_leaves_its_place_in_the_tree(
    product: str, version: str, platform: str, cohort: str
) -> None:
    for path, depth in [
        (wire.bundle_path(product, version, platform), 4),
        (wire.index_path(product, version, platform), 4),
        (wire.delta_path(product, version, platform, DIGEST), 5),
        (wire.policy_path(product), 2),
        (wire.directive_path(product, cohort), 3),
    ]:
        segments = path.split("/")
        assert len(segments) == depth
        assert not {"", ".", ".."} & set(segments)
        assert "\\" not in path


def test_the_signed_text_of_a_request_is_fixed() -> None:
    assert wire.signed_text("POST", "/api/v1/report", DIGEST, 41) == (
        f"relfleet-1\nPOST\n/api/v1/report\n{DIGEST}\n41\n".encode()
    )


def test_reason_codes_are_plain_and_stand_once() -> None:
    codes = [str(reason) for reason in wire.Reason]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("reason", wire.Reason, ids=str)
def test_the_glossary_lists_every_reason_code(reason: wire.Reason) -> None:
    glossary = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text()
    assert f"`{reason}`" in glossary.partition("## Reason codes")[2]
