"""Every reader of foreign bytes, with inputs made from good ones by cutting, repeating and scribbling."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

NUMBERS = (b"-1", b"1e999", b"NaN", b"9" * 5000)
PIECES = (*NUMBERS, b"null", b"[" * 600, b'{"a":' * 300, b"\xff\xfe", b'"\\ud800"', b"\0" * 512)


@pytest.mark.parametrize("name", TARGETS)
def test_what_the_readers_begin_from_is_read_as_promised(name):
    for seed in TARGETS[name].seeds:
        TARGETS[name].call(seed)


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
