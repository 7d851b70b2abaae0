"""A slip in a settings file keeps no host from its product, and no person from steering it."""

from __future__ import annotations

import json

import pytest

from agent_core.errors import SettingsError
from agent_core.layout import Layout
from agent_core.settings import load_agent
from tests.updater.commands.conftest import A, B, Host
from updater import last_good
from updater.device import Device

GOOD = '[poll]\nmin_s = 7\n[server]\nno_proxy = ["a"]\ntimeout_s = 3\n[labels]\nregion = "eu"\n'


@pytest.fixture
def layout(tmp_path):
    made = Layout(tmp_path / "root")
    made.make()
    made.settings.write_text(GOOD)
    return made


@pytest.mark.parametrize(
    "content",
    [b"[poll\n", b"[poll]\nmin_ss = 8\n", b"[poll]\nmin_s = 'often'\n", b"\xff"],
    ids=["no TOML", "a key that is not known", "another kind", "no text"],
)
def test_a_broken_file_leaves_the_settings_of_the_last_time(layout, content):
    kept = load_agent(layout)
    last_good.keep(layout, kept)
    layout.settings.write_bytes(content)
    with pytest.raises(SettingsError):
        load_agent(layout)
    assert last_good.load(layout) == kept


@pytest.mark.parametrize(
    "note", [None, "", "[]", "{", '{"poll.min_s": "often"}'], ids=["none", "empty", "no object", "cut", "odd"]
)
def test_without_a_note_that_can_be_read_the_defaults_do(layout, note):
    layout.settings.write_text("[poll\n")
    if note is not None:
        last_good.note(layout).write_text(note)
    defaults = last_good.load(layout)
    layout.settings.unlink()
    assert defaults == load_agent(layout)


def test_what_another_version_set_besides_is_passed_over(layout):
    last_good.note(layout).write_text(json.dumps({"poll.min_s": 9.0, "moon.phase": "full"}))
    layout.settings.write_text("[poll\n")
    assert last_good.load(layout).poll_min_s == 9


@pytest.mark.parametrize(
    "refused",
    [{"poll.min_s": 0.0}, {"log.level": "trace"}, {"server.client_cert": "a.pem", "server.client_key": 1}],
    ids=["below a bound", "no choice any more", "half of a pair"],
)
def test_a_value_that_this_version_refuses_costs_no_other(layout, refused):
    kept = {"labels": {"region": "eu"}, "server.url": "https://a", "versions.keep": 5}
    last_good.note(layout).write_text(json.dumps(refused | kept))
    layout.settings.write_text("[poll\n")
    loaded = last_good.load(layout)
    layout.settings.unlink()
    assert {name: loaded.settings[name] for name in kept} == kept
    assert [loaded.settings[name] == load_agent(layout).settings[name] for name in refused] == [True] * len(
        refused
    )


def test_the_note_is_for_its_owner_and_is_not_written_again_without_need(layout):
    last_good.keep(layout, load_agent(layout))
    before = last_good.note(layout).stat()
    assert before.st_mode & 0o777 == 0o600
    last_good.keep(layout, load_agent(layout))
    assert last_good.note(layout).stat().st_ino == before.st_ino


def test_a_person_can_steer_a_host_whose_settings_are_broken(tmp_path, capsys):
    host = Host(tmp_path / "root", capsys)
    host.stage(A, B)
    host.on(B, A)
    host.layout.settings.write_text("[poll\n")
    for words in (("hold",), ("unhold",), ("rollback", "--yes"), ("retry",)):
        assert host.agent(*words)[0] == 0, words
    assert host.record.good == A


def test_nothing_new_is_looked_for_while_nobody_knows_what_is_set(tmp_path, capsys):
    host = Host(tmp_path / "root", capsys)
    host.layout.settings.write_text("[poll\n")
    with pytest.raises(SettingsError):
        Device.load(host.root)
    code, _, said = host.agent("once")
    assert (code, "is not TOML" in said) == (2, True)
