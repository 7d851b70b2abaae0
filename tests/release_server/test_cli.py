from __future__ import annotations

import json
import stat
from datetime import timedelta

import pytest

from agent_core.errors import Exit
from keys.roles import ROLES
from release_server import acceptance, doctor, repository
from release_server.cli import main
from release_server.database import newest_revision
from release_server.doctor import examine_lifetime


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A directory that `init` made."""
    monkeypatch.delenv("RELFLEET_SERVER_DATA", raising=False)
    directory = tmp_path / "made"
    assert main(["init", "--data", str(directory), "--url", "https://127.0.0.1:9", "--port", "0"]) == 0
    return directory


@pytest.fixture
def call(capsys):
    """Run a command with --json; its exit code and what it printed."""

    def run(*words):
        capsys.readouterr()
        code = main([*words, "--json"])
        printed = capsys.readouterr()
        return code, json.loads(printed.out or printed.err)

    return run


def mode(place):
    return stat.S_IMODE(place.stat().st_mode)


def test_init_makes_everything_for_the_owner_alone(made):
    assert mode(made) == mode(made / "keys") == 0o700
    for private in ("server.toml", "admin.token", "relfleet.db", "keys/cohorts.key.json"):
        assert mode(made / private) == 0o600, private
    assert set(json.loads((made / "trust" / "online.json").read_text())) == {
        "cohorts",
        "snapshot",
        "timestamp",
    }
    assert (made / "admin.token").read_text().startswith("rft_")


def test_init_prints_where_the_token_is_and_not_the_token(tmp_path, capsys):
    main(["init", "--data", str(tmp_path / "new")])
    printed = capsys.readouterr()
    token = (tmp_path / "new" / "admin.token").read_text().strip()
    assert "admin.token" in printed.out
    assert token not in printed.out + printed.err


def test_init_refuses_what_is_made_already_and_changes_nothing(made, call):
    before = (made / "keys" / "cohorts.key.json").read_bytes()
    code, said = call("init", "--data", str(made))
    assert (code, said["error"]["reason"]) == (Exit.CONFLICT, "exists")
    assert (made / "keys" / "cohorts.key.json").read_bytes() == before


def test_init_refuses_a_directory_with_other_things_in_it(tmp_path, call):
    (tmp_path / "photos").mkdir()
    code, said = call("init", "--data", str(tmp_path))
    assert (code, said["error"]["reason"]) == (Exit.CONFLICT, "exists")


def test_init_goes_on_where_it_was_interrupted_and_keeps_the_keys(made, call):
    before = (made / "keys" / "cohorts.key.json").read_bytes()
    (made / "server.toml").unlink()
    assert call("init", "--data", str(made))[0] == Exit.DONE
    assert (made / "keys" / "cohorts.key.json").read_bytes() == before


def test_commands_without_a_data_directory_say_how_to_make_one(tmp_path, call):
    for words in (
        ["run"],
        ["worker"],
        ["doctor"],
        ["config", "show"],
        ["db", "upgrade"],
        ["export", "trust"],
    ):
        code, said = call(*words, "--data", str(tmp_path))
        assert code == Exit.NOT_FOUND
        assert "release-server init" in said["error"]["then"]


def test_config_show_says_where_each_value_came_from(made, call, monkeypatch):
    monkeypatch.setenv("RELFLEET_SERVER_WORKERS", "7")
    code, rows = call("config", "show", "--data", str(made))
    found = {row["name"]: (row["value"], row["from"]) for row in rows}
    assert code == 0
    assert found["server.workers"] == (7, "environment RELFLEET_SERVER_WORKERS")
    assert found["server.url"] == ("https://127.0.0.1:9", str(made / "server.toml"))
    assert found["jobs.tick_s"] == (1.0, "default")


def test_config_check_refuses_an_unknown_key_with_the_nearest_name(made, call):
    assert call("config", "check", "--data", str(made))[0] == 0
    with (made / "server.toml").open("a") as file:
        file.write("hots = 'x'\n")
    code, said = call("config", "check", "--data", str(made))
    assert code == Exit.USAGE
    assert "server.host" in said["error"]["then"]


def test_the_schema_is_shown_and_upgraded(made, call):
    newest = {"current": newest_revision(), "wanted": newest_revision()}
    assert call("db", "current", "--data", str(made)) == (0, newest)
    (made / "relfleet.db").unlink()
    assert call("db", "current", "--data", str(made))[1]["current"] is None
    assert call("run", "--data", str(made))[1]["error"]["reason"] == "schema"
    assert call("db", "upgrade", "--data", str(made)) == (0, newest)


def test_the_trust_is_exported_once_there_is_a_root(
    data, sessions, managers, clock, online, capsysbinary, tmp_path
):
    assert main(["export", "trust", "--data", str(data)]) == Exit.NOT_FOUND
    body = managers.root().to_bytes()
    with sessions.write() as session:
        acceptance.accept_root(session, body, now=clock(), actor="ada", online=online)
    capsysbinary.readouterr()
    assert main(["export", "trust", "--data", str(data)]) == 0
    assert capsysbinary.readouterr().out == body
    assert main(["export", "trust", "--data", str(data), "-o", str(tmp_path / "root.json")]) == 0
    assert (tmp_path / "root.json").read_bytes() == body


# --- doctor ----------------------------------------------------------------------------------------------


def states(findings):
    return {finding["check"]: finding["state"] for finding in findings}


def test_doctor_finds_a_fresh_server_well_but_down_and_says_what_comes_next(made, call):
    code, findings = call("doctor", "--data", str(made))
    assert code == Exit.UNREACHABLE
    assert states(findings) == {
        "permissions": "note",
        "disk": "ok",
        "keys": "ok",
        "signer": "note",
        "database": "ok",
        "metadata": "note",
        "jobs": "note",
        "listening": "ok",
        "retention": "ok",
        "web": "bad",
        "certificate": "note",
    }
    assert all(finding["then"] for finding in findings if finding["state"] != "ok")


def expose_directory(made):
    made.chmod(0o755)


def expose_key(made):
    (made / "keys" / "timestamp.key.json").chmod(0o640)


def lose_key(made):
    (made / "keys" / "timestamp.key.json").unlink()


def swap_key(made):
    key = made / "keys" / "timestamp.key.json"
    key.write_bytes((made / "keys" / "snapshot.key.json").read_bytes())


def lose_database(made):
    (made / "relfleet.db").unlink()


@pytest.mark.parametrize(
    ("harm", "check"),
    [
        (expose_directory, "permissions"),
        (expose_key, "keys"),
        (lose_key, "keys"),
        (swap_key, "keys"),
        (lose_database, "database"),
    ],
)
def test_doctor_names_what_is_wrong_and_what_to_do(made, call, harm, check):
    harm(made)
    code, findings = call("doctor", "--data", str(made))
    assert code == Exit.FAILED
    bad = [finding for finding in findings if finding["check"] == check]
    assert bad[0]["state"] == "bad"
    assert bad[0]["then"]


@pytest.mark.parametrize(
    ("role", "late", "early"),
    [
        ("root", timedelta(days=59), timedelta(days=61)),
        ("targets", timedelta(days=13), timedelta(days=15)),
        ("cohorts", timedelta(days=3), timedelta(days=5)),
        ("snapshot", timedelta(days=3), timedelta(days=5)),
        ("timestamp", timedelta(hours=8), timedelta(hours=10)),
    ],
)
def test_doctor_warns_before_a_role_expires_and_says_what_to_type(
    sessions, trusted, accept, clock, online_signer, role, late, early
):
    accept(trusted.targets())
    with sessions.write() as session:
        repository.publish(session, online_signer, clock())
        found = {lifetime.role: lifetime for lifetime in repository.lifetimes(session, clock())}
    assert sorted(found) == sorted(ROLES)
    assert (found[role].version, found[role].left) == (1, ROLES[role].expires)
    for left, state in ((-timedelta(1), "bad"), (late, "note"), (early, "ok")):
        with sessions.read() as session:
            now = found[role].expires_at - left
            lifetime = next(each for each in repository.lifetimes(session, now) if each.role == role)
        finding = examine_lifetime(lifetime)
        assert finding.state == state
        assert bool(finding.then) is (state != "ok")


def test_a_check_that_fails_without_a_word_is_named_by_its_error(made, call, monkeypatch):
    def fail(_config, _engine):
        raise TimeoutError

    monkeypatch.setitem(doctor.CHECKS, "disk", fail)
    _, findings = call("doctor", "--data", str(made))
    (found,) = (each for each in findings if each["check"] == "disk")
    assert (found["state"], found["detail"]) == ("bad", "TimeoutError")


def test_doctor_counts_the_hours_of_the_last_two_days_whole(sessions, trusted, accept, clock, online_signer):
    accept(trusted.targets())
    with sessions.write() as session:
        repository.publish(session, online_signer, clock())
        (root,) = (each for each in repository.lifetimes(session, clock()) if each.role == "root")
        then = root.expires_at - timedelta(days=1, hours=5)
        (root,) = (each for each in repository.lifetimes(session, then) if each.role == "root")
    assert examine_lifetime(root).detail.startswith("expires in 29 h,")


def test_a_backup_is_restored_by_the_command_once_it_is_said_what_agents_have_seen(made, call, tmp_path):
    kept, fresh = str(tmp_path / "kept"), str(tmp_path / "fresh")
    assert call("db", "backup", kept, "--data", str(made))[0] == Exit.DONE
    code, said = call("db", "restore", kept, "--data", fresh)
    assert (code, "--published" in json.dumps(said)) == (Exit.USAGE, True)
    assert call("db", "restore", kept, "--data", fresh, "--nothing-published")[0] == Exit.DONE
    code, said = call("db", "current", "--data", fresh)
    assert said["current"] == said["wanted"] == newest_revision()
    assert call("db", "restore", kept, "--data", fresh, "--nothing-published")[0] == Exit.CONFLICT


def test_a_server_without_a_database_is_not_backed_up_as_an_empty_one(made, call, tmp_path):
    (made / "relfleet.db").unlink()
    code, said = call("db", "backup", str(tmp_path / "kept"), "--data", str(made))
    assert (code, said["error"]["why"]) == (Exit.NOT_FOUND, f"{made}/relfleet.db is not there")
    assert not (tmp_path / "kept").exists()
    assert not (made / "relfleet.db").exists()


def test_a_backup_is_not_restored_beside_a_database_that_settings_name_instead(
    made, call, tmp_path, monkeypatch
):
    kept, fresh = str(tmp_path / "kept"), tmp_path / "fresh"
    assert call("db", "backup", kept, "--data", str(made))[0] == Exit.DONE
    monkeypatch.setenv("RELFLEET_DATABASE_URL", f"sqlite:///{tmp_path}/another.db")
    code, said = call("db", "restore", kept, "--data", str(fresh), "--nothing-published")
    assert (code, said["error"]["reason"]) == (Exit.CONFLICT, "another-database")
    assert not list(tmp_path.glob("*fresh*"))
    assert not (tmp_path / "another.db").exists()


@pytest.mark.parametrize("words", [("current",), ("upgrade",), ("backup", "kept")], ids=" ".join)
def test_a_database_that_cannot_be_used_is_no_bug_of_ours(made, call, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    (made / "relfleet.db").write_bytes(b"no database at all" * 1000)
    code, said = call("db", *words, "--data", str(made))
    assert (code, said["error"]["reason"]) == (Exit.FAILED, "database")
    assert said["error"]["why"] == "file is not a database"
    assert not (tmp_path / "kept").exists()
