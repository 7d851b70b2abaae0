"""The files of a ceremony, and the commands that show them."""

import json
from datetime import UTC, datetime

import pytest
from securesystemslib.signer import CryptoSigner

from agent_core import console
from agent_core.errors import ConflictError, NotAllowedError, NotFoundError, UsageError
from keys import ceremony, cli
from keys.ceremony import OnlineKeys

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
WORDS = "correct horse battery"


def online():
    return OnlineKeys(*(CryptoSigner.generate_ed25519().public_key for _ in range(3)))


def hold(directory, keys, words=WORDS, **numbers):
    return cli.hold_ceremony(directory, keys, lambda _prompt: words, NOW, scrypt_n=2**4, **numbers)


@pytest.fixture
def key_group():
    group = console.Group("key")
    for command in (cli.list_keys, cli.show_key, cli.export_trust):
        group.add_command(command)
    return group


def test_a_ceremony_leaves_keys_a_root_and_targets_that_verify(tmp_path):
    held = hold(tmp_path, online(), root_keys=3, root_threshold=2, release_keys=2, release_threshold=2)
    assert held.made
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "release-1.key.json",
        "release-2.key.json",
        "root-1.key.json",
        "root-2.key.json",
        "root-3.key.json",
        "root.json",
        "targets.json",
    ]
    root = ceremony.parse_root((tmp_path / "root.json").read_bytes())
    ceremony.verify_root(root)
    targets = ceremony.parse_targets((tmp_path / "targets.json").read_bytes())
    assert ceremony.missing_signatures(root.signed, "targets", targets) == 0


def test_a_second_run_finds_the_first(tmp_path):
    keys = online()
    first = hold(tmp_path, keys)
    second = hold(tmp_path, keys)
    assert (second.made, second.root, second.targets) == (False, first.root, first.targets)


def test_a_ceremony_that_was_cut_short_goes_on_with_its_own_keys(tmp_path):
    keys = online()
    cli.ensure_keys(tmp_path, "root", 1, passphrase=lambda _prompt: WORDS, now=NOW, scrypt_n=2**4)
    made = (tmp_path / "root.key.json").read_bytes()
    with pytest.raises(NotAllowedError):
        hold(tmp_path, keys, words="another passphrase")
    held = hold(tmp_path, keys)
    assert (tmp_path / "root.key.json").read_bytes() == made
    assert json.loads(made)["keyid"] in held.root.signed.roles["root"].keyids


@pytest.mark.parametrize("numbers", [{"root_keys": 2}, {"release_keys": 2}], ids=str)
def test_a_root_is_never_replaced_by_a_new_beginning(tmp_path, numbers):
    keys = online()
    hold(tmp_path, keys)
    with pytest.raises(ConflictError) as caught:
        hold(tmp_path, keys, **numbers)
    assert caught.value.reason == "root-exists"
    with pytest.raises(ConflictError, match="another ceremony"):
        hold(tmp_path, online())


def test_a_threshold_that_cannot_be_met_makes_no_key(tmp_path):
    with pytest.raises(UsageError):
        hold(tmp_path / "keys", online(), root_keys=2, root_threshold=3)
    assert not (tmp_path / "keys").exists()


def test_a_root_without_its_first_targets_is_not_a_ceremony(tmp_path):
    hold(tmp_path, online())
    (tmp_path / "targets.json").unlink()
    with pytest.raises(NotFoundError):
        cli.read_ceremony(tmp_path)


def test_list_and_show_say_what_each_key_signs(tmp_path, key_group, capsys):
    held = hold(tmp_path, online())
    assert console.run(key_group, "key", ["list", "--json", "--keys-dir", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["signs"]) for row in rows] == [("release", ["targets"]), ("root", ["root"])]
    assert console.run(key_group, "key", ["list", "--keys-dir", str(tmp_path)]) == 0
    assert "scrypt-aesgcm" in capsys.readouterr().out
    keyid = held.root.signed.roles["root"].keyids[0]
    assert console.run(key_group, "key", ["show", keyid[:8], "--json", "--keys-dir", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["keyid"]) == ("root", keyid)
    assert "sealed" not in json.dumps(shown)


def test_show_of_no_key_is_not_found(tmp_path, key_group, capsys):
    assert console.run(key_group, "key", ["show", "nobody", "--keys-dir", str(tmp_path)]) == 7
    assert "there is no key nobody" in capsys.readouterr().err


def test_the_keys_directory_comes_from_the_environment(tmp_path, key_group, capsys, monkeypatch):
    monkeypatch.setenv("RELFLEET_KEYS", str(tmp_path))
    hold(tmp_path, online())
    assert console.run(key_group, "key", ["show", "root"]) == 0
    assert str(tmp_path) in capsys.readouterr().out
    monkeypatch.delenv("RELFLEET_KEYS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert cli.default_dir() == tmp_path / "config" / "relfleet" / "keys"


def test_export_trust_writes_the_root_byte_for_byte(tmp_path, key_group, capfdbinary):
    hold(tmp_path, online())
    body = (tmp_path / "root.json").read_bytes()
    assert console.run(key_group, "key", ["export-trust", "--keys-dir", str(tmp_path)]) == 0
    assert capfdbinary.readouterr().out == body
    out = tmp_path / "trust" / "agents.json"
    arguments = ["export-trust", "-o", str(out), "--keys-dir", str(tmp_path)]
    assert console.run(key_group, "key", arguments) == 0
    assert out.read_bytes() == body


def test_export_trust_refuses_a_root_that_was_tampered_with(tmp_path, key_group, capsys):
    hold(tmp_path, online())
    path = tmp_path / "root.json"
    path.write_text(path.read_text().replace('"threshold":1', '"threshold":1 ', 1))
    assert (
        console.run(
            key_group, "key", ["export-trust", "-o", str(tmp_path / "o"), "--keys-dir", str(tmp_path)]
        )
        == 0
    )
    document = json.loads(path.read_text())
    document["signed"]["expires"] = "2030-01-01T00:00:00Z"
    path.write_text(json.dumps(document))
    assert console.run(key_group, "key", ["export-trust", "--keys-dir", str(tmp_path)]) == 3
    assert "not signed" in capsys.readouterr().err
    empty = str(tmp_path / "none")
    assert console.run(key_group, "key", ["export-trust", "--keys-dir", empty]) == 7
