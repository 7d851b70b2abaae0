"""An operator's desk: the `release` command in this process, against the real application on loopback."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server

from release_server.publish.cli import main


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        """Quiet."""


@dataclass
class Desk:
    """What `release` prints and returns, with the time of the server stepped by the test."""

    capsys: Any

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self.capsys.readouterr()
        code = main(list(words))
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def json(self, *words: str) -> Any:
        """What a call that goes well prints with --json."""
        code, out, err = self.run(*words, "--json", "--yes")
        assert code == 0, (words, code, out, err)
        return json.loads(out)


@contextmanager
def desk(app, token, tmp_path, monkeypatch, capsys, role="operator"):
    """A desk in a directory of its own, signed in to `app` for the product `demo`."""
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    place = tmp_path / "desk"
    place.mkdir()
    monkeypatch.chdir(place)
    for name in ("RELFLEET_PROFILE", "RELFLEET_TOKEN_FILE", "RELFLEET_KEYS", "RELFLEET_TRUST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RELFLEET_SERVER", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("RELFLEET_PRODUCT", "demo")
    monkeypatch.setenv("RELFLEET_TOKEN", token(role))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "config"))
    try:
        yield Desk(capsys)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
