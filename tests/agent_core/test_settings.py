"""Settings: layers, origins, refusals that name file and key, and the live reload."""

from __future__ import annotations

import dataclasses
import logging
import queue
import time
from typing import TYPE_CHECKING

import pytest

from agent_core.errors import SettingsError
from agent_core.settings import AGENT, AgentSettings, Live, Setting, Table, Watcher, fragments, load_agent

if TYPE_CHECKING:
    from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Spot:
    """What `load_agent` needs of a layout."""

    root: Path

    @property
    def settings(self) -> Path:
        return self.root / "agent.toml"

    @property
    def settings_dir(self) -> Path:
        return self.root / "agent.d"


TABLE = Table(
    [
        Setting("server.url", str, "http://a", "the server"),
        Setting("server.proxy", str, "", "the proxy", secret=True),
        Setting("poll.min_s", float, 5.0, "the pace", "s", low=1, high=60),
        Setting("poll.tries", int, 3, "how often", low=0),
        Setting("verbose", bool, False, "say more"),
        Setting("hosts", list, [], "who"),
        Setting("labels", dict, {}, "what"),
        Setting("level", str, "info", "how much", choices=("info", "debug")),
    ]
)


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_a_flag_beats_the_environment_beats_a_later_file_beats_an_earlier_one(tmp_path: Path) -> None:
    first = write(tmp_path / "a.toml", 'verbose = true\nhosts = ["x"]\n[poll]\nmin_s = 10\ntries = 1\n')
    second = write(tmp_path / "b.toml", "[poll]\nmin_s = 20\ntries = 2\n")
    settings = TABLE.load(
        [first, second, tmp_path / "missing.toml"],
        environ={"RELFLEET_POLL_TRIES": "7", "RELFLEET_SERVER_URL": "http://env", "RELFLEET_ROOT": "/x"},
        flags={"server.url": "http://flag", "level": None},
    )
    assert list(settings.show()) == [
        ("server.url", "http://flag", "flag"),
        ("server.proxy", "", "default"),
        ("poll.min_s", 20.0, str(second)),
        ("poll.tries", 7, "environment RELFLEET_POLL_TRIES"),
        ("verbose", True, str(first)),
        ("hosts", ["x"], str(first)),
        ("labels", {}, "default"),
        ("level", "info", "default"),
    ]
    assert settings["poll.tries"] == 7
    assert settings.origin("verbose") == str(first)


def test_labels_of_all_layers_add_up_and_the_stronger_one_wins(tmp_path: Path) -> None:
    first = write(tmp_path / "a.toml", '[labels]\nregion = "eu"\ntier = "db"\n')
    second = write(tmp_path / "b.toml", '[labels]\ntier = "web"\n')
    settings = TABLE.load([first, second], environ={"RELFLEET_LABELS": "rack=7, region=us"})
    assert settings["labels"] == {"region": "us", "tier": "web", "rack": "7"}
    assert settings.origin("labels") == f"{first}, {second}, environment RELFLEET_LABELS"


def test_the_defaults_are_not_shared_between_loads() -> None:
    TABLE.load(environ={})["hosts"].append("x")
    assert TABLE.load(environ={})["hosts"] == []


@pytest.mark.parametrize(
    ("text", "named", "why"),
    [
        pytest.param("[poll]\nmin_ss = 1\n", "poll.min_ss", "did you mean poll.min_s?", id="misspelt key"),
        pytest.param("[pol]\nmin_s = 1\n", "pol", "did you mean", id="misspelt table"),
        pytest.param("zzzzzz = 1\n", "zzzzzz", "config show", id="nothing near"),
        pytest.param(
            '[poll]\nmin_s = "soon"\n', "poll.min_s", "it must be a number, not 'soon'", id="wrong type"
        ),
        pytest.param("[poll]\ntries = true\n", "poll.tries", "a whole number", id="a boolean is no number"),
        pytest.param(
            "[poll]\ntries = 1.5\n", "poll.tries", "a whole number", id="a fraction is no whole number"
        ),
        pytest.param("poll = 3\n", "poll", "not a setting", id="a value where a table stands"),
        pytest.param(
            "[poll]\nmin_s = 0.5\n", "poll.min_s", "at least 1 and at most 60", id="below the range"
        ),
        pytest.param("[poll]\nmin_s = 61\n", "poll.min_s", "at least 1 and at most 60", id="above the range"),
        pytest.param("[poll]\nmin_s = nan\n", "poll.min_s", "it is nan", id="not a number"),
        pytest.param("[poll]\ntries = -1\n", "poll.tries", "at least 0", id="below the only bound"),
        pytest.param('level = "loud"\n', "level", "info, debug", id="not a choice"),
        pytest.param("hosts = [1]\n", "hosts", "every entry", id="not a list of texts"),
        pytest.param("labels = {a = 1}\n", "labels", "'a'", id="not a table of texts"),
        pytest.param('labels = {"A b" = "1"}\n', "labels", "'A b'", id="not a plain label"),
        pytest.param("= nonsense", "is not TOML", "", id="not TOML"),
        pytest.param("a = " + "[" * 10_000, "cannot be read", "nested", id="nested too deeply"),
        pytest.param(
            "[poll]\nmin_s" + ".a" * 3000 + " = 1", "cannot be read", "nested", id="tables nested too deeply"
        ),
        pytest.param(
            "[poll]\nmin_s = 0x1" + "0" * 400,
            "poll.min_s",
            "64 bits",
            id="a number beyond what can be counted",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_file_and_key(
    tmp_path: Path, text: str, named: str, why: str
) -> None:
    file = write(tmp_path / "a.toml", text)
    with pytest.raises(SettingsError) as caught:
        TABLE.load([file], environ={})
    assert str(file) in str(caught.value)
    assert named in caught.value.what
    assert why in str(caught.value)
    assert caught.value.reason == "bad-settings"


def test_a_file_that_is_not_text_and_one_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="is not TOML"):
        TABLE.load([file], environ={})
    with pytest.raises(SettingsError, match="cannot be read"):
        TABLE.load([tmp_path], environ={})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("VERBOSE", "Yes", True),
        ("VERBOSE", "0", False),
        ("POLL_MIN_S", "2.5", 2.5),
        ("HOSTS", " a, b ,", ["a", "b"]),
        ("LABELS", "a=1,b=x=y", {"a": "1", "b": "x=y"}),
        ("LABELS", "", {}),
    ],
)
def test_the_environment_speaks_every_kind(name: str, text: str, value: object) -> None:
    settings = TABLE.load(environ={f"RELFLEET_{name}": text})
    assert settings[name.lower().replace("poll_", "poll.")] == value


@pytest.mark.parametrize(
    ("name", "text"), [("VERBOSE", "maybe"), ("POLL_TRIES", "many"), ("LABELS", "just-a-word")]
)
def test_a_wrong_variable_is_refused_by_its_name(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"environment RELFLEET_{name}"):
        TABLE.load(environ={f"RELFLEET_{name}": text})


def test_flags_may_be_texts_or_values_and_unknown_ones_are_refused() -> None:
    assert TABLE.load(environ={}, flags={"poll.tries": "4"})["poll.tries"] == 4
    assert TABLE.load(environ={}, flags={"poll.tries": 4})["poll.tries"] == 4
    with pytest.raises(SettingsError, match=r"poll\.trys is not a setting"):
        TABLE.load(environ={}, flags={"poll.trys": 4})


def test_a_secret_is_never_shown() -> None:
    settings = TABLE.load(environ={"RELFLEET_SERVER_PROXY": "http://me:hidden@proxy"})
    assert settings["server.proxy"] == "http://me:hidden@proxy"
    assert "hidden" not in str(list(settings.show()))


def test_a_secret_of_a_wrong_form_is_not_quoted() -> None:
    with pytest.raises(SettingsError) as caught:
        AGENT.load(environ={"RELFLEET_SERVER_PROXY": "hidden words"})
    assert "hidden" not in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        AGENT.load(environ={}, flags={"server.proxy": 4711})
    assert "4711" not in str(caught.value)


def test_every_setting_is_in_the_table_for_the_docs() -> None:
    text = AGENT.markdown()
    assert all(f"`{setting.name}`" in text and setting.help in text for setting in AGENT)


def test_every_default_of_the_agent_is_one_that_it_would_accept() -> None:
    for setting in AGENT:
        assert setting.accept(setting.default, "default") == setting.default


def test_the_agents_typed_settings_have_a_field_for_each_setting() -> None:
    names = {field.name for field in dataclasses.fields(AgentSettings)} - {"settings"}
    assert names == {setting.name.replace(".", "_") for setting in AGENT}


def test_the_agent_reads_its_file_and_then_the_fragments_by_name(tmp_path: Path) -> None:
    spot = Spot(tmp_path)
    write(spot.settings, '[server]\nurl = "https://main"\n[labels]\nregion = "eu"\n')
    write(spot.settings_dir / "20-b.toml", '[server]\nurl = "https://b"\n')
    write(spot.settings_dir / "10-a.toml", '[server]\nurl = "https://a"\n[log]\nlevel = "debug"\n')
    write(spot.settings_dir / ".hidden.toml", "broken")
    write(spot.settings_dir / "notes.txt", "broken")
    assert [file.name for file in fragments(spot.settings_dir)] == ["10-a.toml", "20-b.toml"]
    settings = load_agent(spot, environ={"RELFLEET_POLL_MIN_S": "9"})
    assert settings.server_url == "https://b"
    assert settings.log_level == "debug"
    assert settings.poll_min_s == 9.0
    assert settings.labels == {"region": "eu"}
    assert settings.settings.origin("server.url").endswith("20-b.toml")


def test_fragments_that_cannot_be_listed_are_refused_and_end_no_reload(tmp_path: Path) -> None:
    """They are not taken for none: one of them may forbid what the others allow."""
    good, nowhere = Spot(tmp_path), Spot(tmp_path / ("x" * 300))  # a name that no file system takes
    with pytest.raises(SettingsError, match=r"agent\.d cannot be read: File name too long"):
        load_agent(nowhere, environ={})
    live = Live(lambda: load_agent(nowhere, environ={}), lambda _: None, load_agent(good, environ={}))
    live.reload()
    assert "cannot be read" in live.problem


def test_an_agent_without_any_file_runs_on_defaults(tmp_path: Path) -> None:
    assert load_agent(Spot(tmp_path / "nowhere"), environ={}).server_url == ""


@pytest.mark.parametrize("half", ["client_cert", "client_key"])
def test_half_a_client_certificate_is_refused(tmp_path: Path, half: str) -> None:
    spot = Spot(tmp_path)
    write(spot.settings, f'[server]\n{half} = "/x.pem"\n')
    with pytest.raises(SettingsError, match=f"server.{half} is set alone"):
        load_agent(spot, environ={})


def test_a_proxys_password_is_not_in_the_repr_of_the_settings(tmp_path: Path) -> None:
    settings = load_agent(Spot(tmp_path), environ={"RELFLEET_SERVER_PROXY": "http://me:hidden@proxy"})
    assert "hidden" not in repr(settings)


# --- live reload ----------------------------------------------------------------------------------------


def test_a_broken_file_keeps_the_old_settings_and_says_so_until_it_is_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spot = Spot(tmp_path)
    write(spot.settings, "[poll]\nmin_s = 7\n")
    applied: list[float] = []
    live = Live(lambda: load_agent(spot, environ={}), lambda settings: applied.append(settings.poll_min_s))

    write(spot.settings, "[poll]\nmin_ss = 8\n")
    with caplog.at_level(logging.WARNING):
        live.reload()
    assert live.current.poll_min_s == 7
    assert "did you mean poll.min_s?" in live.problem
    assert "settings kept, the new ones cannot be used" in caplog.messages

    write(spot.settings, "[poll]\nmin_s = 8\n")
    live.reload()
    live.reload()
    assert (live.current.poll_min_s, live.problem, applied) == (8, "", [8])


@pytest.mark.parametrize("polling", [False, True], ids=["inotify", "polling"])
def test_a_watcher_notices_replaced_files_and_new_fragments(tmp_path: Path, polling: bool) -> None:
    spot = Spot(tmp_path)
    write(spot.settings, "")
    changes: queue.Queue[float] = queue.Queue()
    watcher = Watcher(
        [spot.settings, spot.settings_dir],
        lambda: changes.put(time.monotonic()),
        debounce_s=0.02,
        poll_s=0.05,
        polling=polling,
    )
    watcher.start()
    try:
        write(tmp_path / "agent.toml.new", "[poll]\nmin_s = 8\n").replace(spot.settings)
        changes.get(timeout=10)
        spot.settings_dir.mkdir()
        changes.get(timeout=10)
        settle(changes)
        write(spot.settings_dir / "10.toml", "[poll]\nmin_s = 9\n")
        changes.get(timeout=10)
    finally:
        watcher.stop()


def settle(changes: queue.Queue[float]) -> None:
    """Take what a burst still brings."""
    while True:
        try:
            changes.get(timeout=0.3)
        except queue.Empty:
            return


def test_reading_the_files_and_unrelated_files_do_not_wake_the_watcher(tmp_path: Path) -> None:
    spot = Spot(tmp_path)
    write(spot.settings, "")
    changes: queue.Queue[float] = queue.Queue()
    watcher = Watcher([spot.settings, spot.settings_dir], lambda: changes.put(0), debounce_s=0.01)
    watcher.start()
    try:
        for _ in range(20):
            spot.settings.read_text()
            write(tmp_path / "unrelated", "x")
        # A change that must be seen comes after: were one of those above seen too, there would be two.
        write(spot.settings, "# changed\n")
        changes.get(timeout=10)
        settle(changes)
        write(tmp_path / "unrelated", "y")
        spot.settings.read_text()
        write(spot.settings_dir / "10.toml", "")
        changes.get(timeout=10)
    finally:
        watcher.stop()


def test_without_inotify_the_watcher_looks_on_a_timer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import watchdog.observers

    class NoInotify(watchdog.observers.Observer):  # type: ignore[misc]
        def start(self) -> None:
            raise OSError(24, "inotify instance limit reached")

    monkeypatch.setattr(watchdog.observers, "Observer", NoInotify)
    file = write(tmp_path / "agent.toml", "")
    changes: queue.Queue[float] = queue.Queue()
    watcher = Watcher([file], lambda: changes.put(0), debounce_s=0.01, poll_s=0.05)
    with caplog.at_level(logging.WARNING):
        watcher.start()
    try:
        assert "settings are looked at on a timer" in caplog.messages
        write(file, "# longer than before\n")
        changes.get(timeout=10)
    finally:
        watcher.stop()


def test_what_the_reload_raises_does_not_end_the_watching(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "agent.toml", "")
    calls: queue.Queue[int] = queue.Queue()

    def fail() -> None:
        calls.put(1)
        raise RuntimeError("broken")

    watcher = Watcher([file], fail, debounce_s=0.01)
    with caplog.at_level(logging.CRITICAL):
        watcher.start()
        try:
            write(file, "# 1\n")
            calls.get(timeout=10)
            write(file, "# 2\n")
            calls.get(timeout=10)
        finally:
            watcher.stop()
