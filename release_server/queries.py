r"""The language that says which agents belong to a cohort. Pure.

    query    = [ term *( "," term ) ]                  all must hold; an empty query matches every agent
    term     = key                                     the fact is known
             | "!" key                                 it is not
             | key ( "=" | "==" | "!=" ) value
             | key ( "<" | "<=" | ">" | ">=" ) value   compared as versions
             | key ( "in" | "notin" ) "(" value *( "," value ) ")"
    value    = text without spaces and , ( ) = ! < > " | '"' any text '"', with \" and \\ in it

`!=` and `notin` hold where the fact is not known; a comparison does not, nor where it is no version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from agent_core.errors import UsageError
from agent_core.wire import LABEL_KEY

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TOKEN = re.compile(
    r'\s*(?:(?P<quoted>"(?:[^"\\]|\\["\\])*")|(?P<sign>==|!=|<=|>=|[=<>!,()])|(?P<word>[^\s,=!<>()"]+))'
)
ESCAPE = re.compile(r'\\(["\\])')
NUMBERS = re.compile(r"[0-9]+(?:\.[0-9]+)*")
MAX_VALUE = 256
MAX_TERMS = 64


class Operator(StrEnum):
    EQUALS = "="
    DIFFERS = "!="
    BELOW = "<"
    AT_MOST = "<="
    ABOVE = ">"
    AT_LEAST = ">="
    IN = "in"
    NOT_IN = "notin"
    EXISTS = "exists"
    MISSING = "!"


ORDERS = frozenset({Operator.BELOW, Operator.AT_MOST, Operator.ABOVE, Operator.AT_LEAST})


@dataclass(frozen=True)
class Term:
    """One condition on one fact; `values` has one entry but for `in` and `notin`."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def holds(self, facts: Mapping[str, str]) -> bool:
        known = facts.get(self.key)
        match self.operator:
            case Operator.EQUALS | Operator.IN:
                return known in self.values
            case Operator.DIFFERS | Operator.NOT_IN:
                return known not in self.values
            case Operator.EXISTS:
                return known is not None
            case Operator.MISSING:
                return known is None
            case _:
                return known is not None and compares(known, self.operator, self.values[0])

    def __str__(self) -> str:
        match self.operator:
            case Operator.EXISTS:
                return self.key
            case Operator.MISSING:
                return f"!{self.key}"
            case Operator.IN | Operator.NOT_IN:
                return f"{self.key} {self.operator} ({', '.join(map(quoted, self.values))})"
            case _:
                return f"{self.key}{self.operator}{quoted(self.values[0])}"


@dataclass(frozen=True)
class Query:
    """Terms that must all hold; none at all matches every agent. `str` gives it in its plainest form."""

    terms: tuple[Term, ...] = ()

    def matches(self, facts: Mapping[str, str]) -> bool:
        return all(term.holds(facts) for term in self.terms)

    def __str__(self) -> str:
        return ", ".join(map(str, self.terms))


def version_of(text: str) -> Version | None:
    """A text as a version: as `packaging` reads it, else by the numbers it begins with; None without any.

    A kernel's `6.1.0-13-amd64` is 6.1.0 that way.
    """
    try:
        return Version(text)
    except InvalidVersion:
        found = NUMBERS.match(text)
        return Version(found[0]) if found else None


def compares(known: str, operator: Operator, value: str) -> bool:
    """Whether `known` stands so to `value`, both as versions; False where one of them is none."""
    left, right = version_of(known), version_of(value)
    if left is None or right is None:
        return False
    match operator:
        case Operator.BELOW:
            return left < right
        case Operator.AT_MOST:
            return left <= right
        case Operator.ABOVE:
            return left > right
        case _:
            return left >= right


def quoted(value: str) -> str:
    """A value as it must be written in a query."""
    found = TOKEN.fullmatch(value)
    if found and found["word"] == value:
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


# --- reading ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def parse(text: str) -> Query:
    """Read a query.

    Raises:
        UsageError: reason `bad-match`, naming where it cannot be read.
    """
    return _Reader(text).query()


class _Reader:
    """One pass over the tokens, a method a rule of the grammar."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(_tokens(text))
        self.place = 0

    def query(self) -> Query:
        if not self.tokens:
            return Query()
        terms = [self._term()]
        while self._take_sign(","):
            terms.append(self._term())
        if self.place < len(self.tokens):
            raise self._refusal("terms are separated by commas")
        if len(terms) > MAX_TERMS:
            raise self._refusal(f"it has more than {MAX_TERMS} terms")
        return Query(tuple(terms))

    def _term(self) -> Term:
        if self._take_sign("!"):
            return Term(self._key(), Operator.MISSING)
        key = self._key()
        for sign in ("==", *Operator):
            if sign in ("exists", "!") or not self._take_sign(sign, words=sign in ("in", "notin")):
                continue
            operator = Operator.EQUALS if sign == "==" else Operator(sign)
            values = self._list() if operator in (Operator.IN, Operator.NOT_IN) else (self._value(operator),)
            return Term(key, operator, values)
        return Term(key, Operator.EXISTS)

    def _list(self) -> tuple[str, ...]:
        if not self._take_sign("("):
            raise self._refusal("a list stands in brackets")
        values = [self._value(Operator.IN)]
        while self._take_sign(","):
            values.append(self._value(Operator.IN))
        if not self._take_sign(")"):
            raise self._refusal("a list ends with a bracket")
        return tuple(values)

    def _key(self) -> str:
        kind, key = self._peek()
        if kind != "word" or not LABEL_KEY.fullmatch(key):
            raise self._refusal("a term begins with a key in lower case")
        self.place += 1
        return key

    def _value(self, operator: Operator) -> str:
        kind, value = self._peek()
        if kind not in ("word", "quoted"):
            if operator in (Operator.EQUALS, Operator.DIFFERS):
                return ""  # `zone=` is the label that is there and empty
            raise self._refusal("a value is missing")
        if len(value) > MAX_VALUE:
            raise self._refusal(f"a value has more than {MAX_VALUE} characters")
        if operator in ORDERS and version_of(value) is None:
            raise self._refusal(f"{value!r} is not a version")
        self.place += 1
        return value

    def _take_sign(self, sign: str, *, words: bool = False) -> bool:
        taken = self._peek() == ("word" if words else "sign", sign)
        self.place += taken
        return taken

    def _peek(self) -> tuple[str, str]:
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", "")

    def _refusal(self, why: str) -> UsageError:
        kind, near = self._peek()
        return _refusal(near if kind != "end" else "its end", why)


def _tokens(text: str) -> Iterable[tuple[str, str]]:
    place, end = 0, len(text.rstrip())
    while place < end:
        found = TOKEN.match(text, place)
        if found is None:
            raise _refusal(text[place:].strip(), "a quote is not closed")
        kind = str(found.lastgroup)
        token = found[kind]
        yield kind, ESCAPE.sub(r"\1", token[1:-1]) if kind == "quoted" else token
        place = found.end()


def _refusal(near: str, why: str) -> UsageError:
    return UsageError(
        f"the match cannot be read at {near[:80]!r}",
        why=f"{why}; terms are key=value, key!=value, key<value, key in (a, b), key and !key",
        then="for example: region=eu,tier!=db or version<1.4",
        reason="bad-match",
    )
