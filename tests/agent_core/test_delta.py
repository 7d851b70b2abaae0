"""From one version's files to another's: round trips, the same bytes each time, and every lie refused."""

from __future__ import annotations

import random
import shutil
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_core import delta
from agent_core.bundle import Index, pack, zstd
from agent_core.errors import TrustError

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # many small files, each fsynced
NOISE = random.Random(1).randbytes(50_000)
OLD = {"agent.py": NOISE, "app/kept": b"kept" * 9, "app/gone": b"moved content", "app/tiny": b"old"}
NEW = {
    "agent.py": NOISE[:20_000] + b"changed" + NOISE[20_000:],
    "app/kept": b"kept" * 9,
    "app/new": b"new" * 9,
}
NEW |= {"lib/moved": b"moved content", "app/tiny": b"new"}


class Tree:
    """Files on the disk, with the index that a bundle of them would have."""

    def __init__(self, place: Path, contents: dict[str, bytes]) -> None:
        self.tree, self.contents = place, contents
        for path, content in contents.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(content)
        place.mkdir(parents=True, exist_ok=True)
        files = pack(place, place.with_name(f"{place.name}.tar.zst"))
        self.index = Index("shop", "1.0.0", "any", ("{python}", "agent.py"), files)


class Pair:
    """An old tree, a new one, and the delta between them."""

    def __init__(self, home: Path, old=OLD, new=NEW) -> None:
        self.home = home
        self.old, self.new = Tree(home / "old", old), Tree(home / "new", new)
        self.file = home / "delta"
        delta.make(self.old.tree, self.old.index, self.new.tree, self.new.index, self.file)

    @property
    def content(self) -> bytes:
        return self.file.read_bytes()

    def apply(self, content: bytes | None = None) -> str:
        if content is not None:
            self.file.write_bytes(content)
        into = self.home / "into"
        shutil.rmtree(into, ignore_errors=True)
        return delta.apply(self.file, self.old.tree, self.old.index, self.new.index, into)

    def applied(self) -> dict[str, bytes]:
        into = self.home / "into"
        return {str(path.relative_to(into)): path.read_bytes() for path in into.rglob("*") if path.is_file()}

    def refusal(self, content: bytes | None = None) -> str:
        with pytest.raises(TrustError) as caught:
            self.apply(content)
        return f"{caught.value.reason}: {caught.value.why}"


@pytest.fixture
def pair(tmp_path):
    return Pair(tmp_path)


def test_a_delta_makes_the_new_files_of_the_old(pair):
    assert pair.apply() == sha256(pair.content).hexdigest()
    assert pair.applied() == NEW
    modes = {oct(path.stat().st_mode & 0o777) for path in (pair.home / "into").rglob("*") if path.is_file()}
    assert modes == {"0o444"}


def test_what_is_the_same_costs_nothing_and_what_is_nearly_the_same_little(tmp_path):
    assert Pair(tmp_path / "same", OLD, {"elsewhere": NOISE, "agent.py": b"kept" * 9}).content == b""
    assert len(Pair(tmp_path / "near", OLD, {"agent.py": NEW["agent.py"]}).content) < 100


def test_a_file_is_whole_where_the_old_one_does_not_help(tmp_path):
    content = Pair(tmp_path, {"agent.py": NOISE[:9_000]}, {"agent.py": NOISE[9_000:20_000]}).content
    assert content[:1] == delta.WHOLE


def test_files_that_are_too_large_for_the_memory_of_a_device_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(delta, "MOST_PREFIX", 60_000)
    pair = Pair(tmp_path)
    assert pair.content[:1] == delta.WHOLE
    pair.apply()
    assert pair.applied() == NEW


def test_the_same_files_give_the_same_bytes(tmp_path):
    assert Pair(tmp_path / "one").content == Pair(tmp_path / "two").content


TREES = st.dictionaries(
    st.sampled_from(["a", "b", "c/d", "c/e"]),
    st.sampled_from([b"", b"x", NOISE[:9], NOISE[:3_000], NOISE[9:3_000] + b"!", bytes(300_000)]),
)


@settings(max_examples=25, deadline=None)
@given(old=TREES, new=TREES)
def test_whatever_the_files_the_new_come_of_the_old(old, new):
    with TemporaryDirectory(dir=MEMORY) as home:
        pair = Pair(Path(home), old, new)
        pair.apply()
        assert pair.applied() == new


# --- lies -------------------------------------------------------------------------------------------------


def whole(content: bytes) -> bytes:
    return delta.WHOLE + zstd.compress(content)


AGENT, TINY, REST = NEW["agent.py"], whole(NEW["app/tiny"]), whole(NEW["app/new"])


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        pytest.param(b"", "bad-archive: it ends too early", id="nothing"),
        pytest.param(b"\2", "not known", id="another kind"),
        pytest.param(b"../../etc/passwd", "not known", id="a path"),
        pytest.param(whole(AGENT[:-1]) + REST + TINY, "comes out otherwise", id="shorter"),
        pytest.param(whole(AGENT + b"x") + REST + TINY, "holds more", id="longer"),
        pytest.param(whole(bytes(2**28)), "holds more", id="a bomb"),
        pytest.param(whole(AGENT) + TINY + REST, "holds more|comes out otherwise", id="another order"),
        pytest.param(whole(AGENT) + REST + TINY + b"x", "bytes after its end", id="more bytes"),
        pytest.param(whole(AGENT) + REST + TINY + TINY, "bytes after its end", id="one file more"),
        pytest.param(delta.WHOLE + b"noise" * 9, "cannot be decompressed", id="no frame"),
        pytest.param(
            whole(AGENT) + delta.PREFIX + REST[1:], "may not serve", id="a prefix that is not there"
        ),
    ],
)
def test_a_delta_that_lies_is_refused(pair, content, refusal):
    said = pair.refusal(content)
    assert any(words in said for words in refusal.split("|")), said
    assert set(pair.applied()) <= set(NEW)


def test_a_frame_that_wants_more_memory_than_its_file_is_refused(pair):
    options = {zstd.CompressionParameter.window_log: 27}
    press = zstd.ZstdCompressor(options=options)
    greedy = press.compress(AGENT) + press.flush()  # of a length not said at its head, so the window counts
    for kind in (delta.WHOLE, delta.PREFIX):
        assert "cannot be decompressed" in pair.refusal(kind + greedy + REST + TINY)


def test_a_delta_that_is_cut_anywhere_is_refused(pair):
    content = pair.content
    for length in range(0, len(content), 7):
        assert pair.refusal(content[:length]).startswith(("bad-archive", "digest-mismatch"))


@pytest.mark.parametrize("path", ["agent.py", "app/kept", "app/gone"])
@pytest.mark.parametrize("damage", [lambda old: old[:-1], lambda old: b"?" + old[1:], lambda old: old + b"?"])
def test_a_damaged_old_file_never_gives_other_content(pair, path, damage):
    file = pair.old.tree / path
    file.write_bytes(damage(file.read_bytes()))
    if damage(b"ab") == b"ab?":  # what is there beyond the index is not read
        pair.apply()
        assert pair.applied() == NEW
    else:
        assert "digest-mismatch" in pair.refusal()


def test_an_old_file_that_became_a_link_is_not_followed(pair):
    file = pair.old.tree / "app/kept"
    file.rename(pair.home / "elsewhere")
    file.symlink_to(pair.home / "elsewhere")
    with pytest.raises(Exception, match="could not be unpacked"):
        pair.apply()


@pytest.fixture(scope="module")
def one_pair():
    with TemporaryDirectory(dir=MEMORY) as home:
        pair = Pair(Path(home))
        yield pair, pair.content


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_changed_delta_gives_the_new_files_or_nothing(one_pair, data):
    pair, right = one_pair
    content = bytearray(right)
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    with suppress(TrustError):
        pair.apply(bytes(content))
        assert pair.applied() == NEW
