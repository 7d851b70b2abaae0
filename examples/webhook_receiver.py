"""An example receiver of webhooks: it believes what is signed for it, takes each event once, and prints it.

WEBHOOK_SECRET=whsec_… python3 webhook_receiver.py [PORT]     (TLS is the part of a proxy in front)
"""

import hmac
import json
import os
import sqlite3
import sys
import time
from base64 import b64decode, b64encode
from http.server import BaseHTTPRequestHandler, HTTPServer

SECRET = b64decode(os.environ["WEBHOOK_SECRET"].removeprefix("whsec_"))
TAKEN = sqlite3.connect(os.environ.get("WEBHOOK_TAKEN", "taken.db"))
TAKEN.execute("CREATE TABLE IF NOT EXISTS taken (id TEXT PRIMARY KEY)")


def is_genuine(headers, body):
    """Whether the body was signed with our secret, and lately: `id.timestamp.body`, as bytes."""
    stamp = headers.get("webhook-timestamp", "")
    signed = f"{headers.get('webhook-id')}.{stamp}.".encode() + body
    wanted = b"v1," + b64encode(hmac.digest(SECRET, signed, "sha256"))
    fresh = stamp.isdecimal() and abs(time.time() - int(stamp)) < 300
    found = headers.get("webhook-signature", "").encode().split()
    return fresh and any(hmac.compare_digest(wanted, one) for one in found)


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 65_536))
        genuine = is_genuine(self.headers, body)
        if genuine:
            with TAKEN:  # what is printed is noted in the same transaction; a repeat finds its id
                new = TAKEN.execute(
                    "INSERT OR IGNORE INTO taken VALUES (?)", [self.headers["webhook-id"]]
                ).rowcount
                if new:
                    event = json.loads(body)
                    print(event["sequence"], event["type"], json.dumps(event["data"]), flush=True)
        self.send_response(204 if genuine else 401)
        self.end_headers()


if __name__ == "__main__":
    HTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8480), Receiver).serve_forever()
