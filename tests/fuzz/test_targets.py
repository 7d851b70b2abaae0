"""Every reader of foreign bytes, with inputs made from good ones by cutting, repeating and scribbling."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

NUMBERS = (b"-1", b"1e999", b"NaN", b"9" * 5000)
PIECES = (*NUMBERS, b"null", b"[" * 600, b'{"a":' * 300, b"\xff\xfe", b'"\\ud800"', b"\0" * 512)
ODD = (None, True, -1, 2**70, 0.5, "", "\ud800", [], {}, [None], {"a": None})
SIGNED = {"device-metadata", "next-root"}
"""Signatures are made and verified for each; so a value is something odd in two ways and not in twelve."""


def trees(name):
    """What a target begins from, where that is JSON."""
    for seed in TARGETS[name].seeds:
        with suppress(ValueError, RecursionError):
            tree = json.loads(seed)
            if isinstance(tree, (dict, list)):
                yield tree


def slips(whole, node):
    """The whole with each value in it, one after the other, gone or something odd."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        for odd in ODD:
            node[key] = odd
            yield json.dumps(whole).encode()
        del node[key]
        yield json.dumps(whole).encode()
        node.update({key: value}) if isinstance(node, dict) else node.insert(key, value)
        if isinstance(value, (dict, list)):
            yield from slips(whole, value)


@pytest.mark.parametrize("name", TARGETS)
def test_what_the_readers_begin_from_is_read_as_promised(name):
    for seed in TARGETS[name].seeds:
        TARGETS[name].call(seed)


@pytest.mark.parametrize("name", [name for name in TARGETS if any(trees(name))])
def test_no_value_in_the_place_of_another_brings_a_reader_to_break_its_promise(name):
    for tree in trees(name):
        for raw in islice(slips(tree, tree), 0, None, 5 if name in SIGNED else 1):
            TARGETS[name].call(raw)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=30)
@given(choice=st.data())
def test_no_bytes_whatever_bring_a_reader_to_break_its_promise(name, choice):
    target = TARGETS[name]
    raw = choice.draw(st.sampled_from(target.seeds))
    for _ in range(choice.draw(st.integers(1, 3))):
        at = choice.draw(st.integers(0, len(raw)))
        gone = choice.draw(st.integers(0, 8))
        new = choice.draw(st.binary(max_size=8) | st.sampled_from(PIECES))
        raw = raw[:at] + new + raw[at + gone :]
    target.call(raw)
