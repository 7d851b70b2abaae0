"""A receiver of webhooks on loopback that answers as a test says, and believes what is signed for it."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Receiver:
    """What has arrived; `answers` holds the next statuses, then it is 200 again."""

    url: str = ""
    got: list = field(default_factory=list)
    answers: list = field(default_factory=list)
    headers: dict = field(default_factory=dict)
    hook: object = None

    def types(self):
        return [json.loads(body)["type"] for _, body in self.got]

    def ids(self):
        return [headers["webhook-id"] for headers, _ in self.got]

    def sequences(self):
        return [json.loads(body)["sequence"] for _, body in self.got]


@contextmanager
def receiver(tls=None):
    made = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            if made.hook is not None:
                made.hook()
            self.send_response(made.answers.pop(0) if made.answers else 200)
            for name, value in made.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    made.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}/relfleet?key=in-the-url"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
