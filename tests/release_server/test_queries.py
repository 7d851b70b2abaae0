"""The language of cohorts: what it reads, what it refuses, and when it holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from agent_core.errors import UsageError
from release_server.queries import Operator, Query, Term, compares, parse, version_of

EU_WEB = {"region": "eu", "tier": "web", "version": "1.10.0", "kernel": "6.1.0-13-amd64", "note": "a, b"}
KEYS = st.from_regex(r"[a-z][a-z0-9._/-]{0,6}", fullmatch=True)
VALUES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
VERSIONS = st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){0,3}(rc1|\.post1)?", fullmatch=True)
ONE_VALUE = (Operator.EQUALS, Operator.DIFFERS)
TERMS = st.one_of(
    st.builds(Term, KEYS, st.sampled_from([Operator.EXISTS, Operator.MISSING])),
    st.builds(lambda key, how, value: Term(key, how, (value,)), KEYS, st.sampled_from(ONE_VALUE), VALUES),
    st.builds(
        lambda key, how, values: Term(key, how, tuple(values)),
        KEYS,
        st.sampled_from([Operator.IN, Operator.NOT_IN]),
        st.lists(VALUES, min_size=1, max_size=3),
    ),
    st.builds(
        lambda key, how, value: Term(key, how, (value,)),
        KEYS,
        st.sampled_from([Operator.BELOW, Operator.AT_MOST, Operator.ABOVE, Operator.AT_LEAST]),
        VERSIONS,
    ),
)


@pytest.mark.parametrize(
    ("text", "facts", "fits"),
    [
        ("", {}, True),
        ("  ", EU_WEB, True),
        ("region=eu", EU_WEB, True),
        ("region==eu", EU_WEB, True),
        ("region=us", EU_WEB, False),
        ("region=eu", {}, False),
        ("tier!=db", EU_WEB, True),
        ("tier!=web", EU_WEB, False),
        ("tier!=db", {}, True),
        ("region", EU_WEB, True),
        ("rack", EU_WEB, False),
        ("!rack", EU_WEB, True),
        ("!region", EU_WEB, False),
        (" region = eu , tier != db , !rack ", EU_WEB, True),
        ("region=eu,tier=db", EU_WEB, False),
        ("zone=", {"zone": ""}, True),
        ("zone=,region=eu", EU_WEB, False),
        ("region in (eu, us)", EU_WEB, True),
        ("region in (us)", EU_WEB, False),
        ("region notin (us)", EU_WEB, True),
        ("rack notin (a)", EU_WEB, True),
        ("rack in (a)", EU_WEB, False),
        ('note="a, b"', EU_WEB, True),
        (r'q="say \"x\" \\"', {"q": 'say "x" \\'}, True),
        ("version<1.4", EU_WEB, False),
        ("version>=1.9,version<2", EU_WEB, True),
        ("version>1.10.0rc1", EU_WEB, True),
        ("version<=1.10", EU_WEB, True),
        ("kernel>=5.10", EU_WEB, True),
        ("region<2", EU_WEB, False),
        ("rack<2", EU_WEB, False),
        ("region=eu, tier!=db, version<1.4", EU_WEB | {"version": "1.3.9"}, True),
    ],
)
def test_a_query_holds_when_every_term_does(text, facts, fits):
    assert parse(text).matches(facts) is fits


@pytest.mark.parametrize(
    "text",
    [
        *("=eu", "region=eu,", ",", "!", "!=x", "Region=eu", "region=a=b", "region=a b", "!a=b", "a b"),
        *(
            "version<",
            "version<new",
            "a in",
            "a in b",
            "a in ()",
            "a in (b",
            "a in (b,)",
            'a="b',
            "a(b)",
            "<1",
        ),
        ",".join(["a"] * 65),
        "a=" + "x" * 257,
    ],
)
def test_a_query_that_cannot_be_read_is_refused_with_an_example(text):
    with pytest.raises(UsageError) as refused:
        parse(text)
    assert refused.value.reason == "bad-match"
    assert "region=eu,tier!=db" in refused.value.then


@given(st.text(max_size=40), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=4))
def test_any_text_is_a_query_or_a_refusal(text, facts):
    try:
        query = parse(text)
    except UsageError:
        return
    assert query.matches(facts) in (True, False)


@given(st.lists(TERMS, max_size=5))
def test_what_is_written_down_is_read_back(terms):
    query = Query(tuple(terms))
    assert parse(str(query)) == query


@given(st.lists(TERMS, max_size=4), st.dictionaries(KEYS, VALUES | VERSIONS, max_size=4))
def test_a_term_and_its_opposite_never_hold_together(terms, facts):
    opposite = {
        Operator.EQUALS: Operator.DIFFERS,
        Operator.IN: Operator.NOT_IN,
        Operator.EXISTS: Operator.MISSING,
        Operator.BELOW: Operator.AT_LEAST,
        Operator.ABOVE: Operator.AT_MOST,
    }
    for term in terms:
        if term.operator in opposite:
            other = Term(term.key, opposite[term.operator], term.values)
            assert not (term.holds(facts) and other.holds(facts))


@given(VERSIONS, VERSIONS)
def test_versions_compare_as_packaging_says(left, right):
    assert compares(left, Operator.BELOW, right) is (Version(left) < Version(right))
    assert compares(left, Operator.AT_LEAST, right) is (Version(left) >= Version(right))


@pytest.mark.parametrize(
    ("text", "read"), [("6.1.0-13-amd64", "6.1.0"), ("1.2", "1.2"), ("unknown", None), ("", None)]
)
def test_what_is_no_version_counts_by_the_numbers_it_begins_with(text, read):
    found = version_of(text)
    assert found is None if read is None else found == Version(read)


def test_no_terms_match_everything():
    assert Query().matches({})
