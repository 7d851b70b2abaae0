from __future__ import annotations

import pytest

from agent_core.errors import NotFoundError, SettingsError
from release_server.config import TABLE, Config, data_directory, first_file
from tests.postgres import only_sqlite


def write(data, text):
    (data / "server.toml").write_text(text)


def test_flags_are_stronger_than_the_environment_and_that_than_the_file(data):
    write(data, "[server]\nport = 1\nhost = 'file'\nworkers = 5\n")
    environ = {"RELFLEET_SERVER_PORT": "2", "RELFLEET_SERVER_HOST": "environment"}
    config = Config.load(data, environ=environ, flags={"server.port": 3})
    assert (config.port, config.host, config.workers) == (3, "environment", 5)
    assert config.settings.origin("server.port") == "flag"


def test_an_unknown_key_is_refused_with_the_nearest_name(data):
    write(data, "[server]\nprot = 1\n")
    with pytest.raises(SettingsError) as caught:
        Config.load(data, environ={})
    assert "server.port" in caught.value.then


def test_a_lease_shorter_than_three_ticks_is_refused(data):
    write(data, "[jobs]\ntick_s = 5.0\nlease_s = 10.0\n")
    with pytest.raises(SettingsError):
        Config.load(data, environ={})


def test_a_directory_that_was_never_initialised_says_how_to(tmp_path):
    with pytest.raises(NotFoundError) as caught:
        Config.load(tmp_path, environ={})
    assert "release-server init" in caught.value.then


@only_sqlite
def test_without_a_database_url_sqlite_lies_in_the_data_directory(data):
    assert Config.load(data, environ={}).database_url == f"sqlite:///{data / 'relfleet.db'}"
    url = "postgresql+psycopg://user:secret@host/db"
    config = Config.load(data, environ={"RELFLEET_DATABASE_URL": url})
    assert config.database_url == url
    assert "user:secret" not in str(list(config.settings.show()))


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({"RELFLEET_SERVER_URL": "https://updates.example/"}, "https://updates.example"),
        ({"RELFLEET_SERVER_HOST": "::1", "RELFLEET_SERVER_PORT": "80"}, "http://[::1]:80"),
        ({"RELFLEET_SERVER_PORT": "81"}, "http://127.0.0.1:81"),
    ],
    ids=["given", "v6", "v4"],
)
def test_the_url_is_the_one_given_or_made_of_host_and_port(data, environ, url):
    assert Config.load(data, environ=environ).url == url


def test_the_first_file_reads_back(data):
    write(data, first_file({"server.url": "https://a.example", "server.port": 99, "server.host": None}))
    config = Config.load(data, environ={})
    assert (config.url, config.port) == ("https://a.example", 99)


def test_the_data_directory_of_the_environment(data):
    assert data_directory({"RELFLEET_SERVER_DATA": str(data)}) == data
    with pytest.raises(SettingsError):
        data_directory({})


def test_every_setting_says_what_it_is():
    assert all(setting.help for setting in TABLE)
