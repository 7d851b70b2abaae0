"""What the client makes of answers: the right error, retries that may help, and none that may not."""

import contextlib
import json
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agent_core.errors import (
    ConflictError,
    DiskError,
    Exit,
    MalformedError,
    NotAllowedError,
    NotFoundError,
    RelfleetError,
    TrustError,
    UnreachableError,
    UsageError,
)
from agent_core.wire import Problem
from release_server.publish.client import ATTEMPTS, MOST_WAIT_S, Client
from tests.release_origin import TOKEN, Answer

REPOSITORY = Path(__file__).parents[3]


def problem(status, reason="some-reason", **headers):
    body = json.dumps(Problem(status, "what", "why", reason, "then").to_json()).encode()
    return Answer(status, body, headers)


def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_json_goes_both_ways_with_the_token(client, origin):
    assert client.get("/whoami") == {"name": "ada", "role": "admin"}
    assert client.post("/products", {"name": "p"}) == {"name": "p"}
    assert client.items("/products") == [{"name": "p"}]
    assert origin.seen[0].headers["Authorization"] == f"Bearer {TOKEN}"
    assert json.loads(origin.calls("POST")[0].body) == {"name": "p"}


def test_parameters_that_are_none_are_left_out(client, origin):
    client.get("/releases", product="p", cohort=None)
    assert origin.seen[0].query == {"product": ["p"]}


def test_a_list_is_followed_to_its_last_page_unless_a_limit_is_asked_for(client, origin):
    def answer(items, following):
        body = json.dumps({"items": items, "next": following}).encode()
        return Answer(200, body, {"Content-Type": "application/json"})

    pages = [answer([{"n": 1}], "1"), answer([], "2"), answer([{"n": 2}], None)]
    origin.instead.extend(pages)
    assert client.items("/tokens", role="reader") == [{"n": 1}, {"n": 2}]
    asked = [seen.query for seen in origin.seen]
    assert asked == [{"role": ["reader"]}, *({"role": ["reader"], "after": [n]} for n in "12")]
    origin.instead.append(answer([{"n": 1}], "1"))
    assert client.items("/tokens", limit=1) == [{"n": 1}]


def test_a_list_that_goes_in_circles_ends(client, origin):
    page = json.dumps({"items": [{"n": 1}], "next": "1"}).encode()
    origin.instead.extend(Answer(200, page, {"Content-Type": "application/json"}) for _ in range(2))
    assert len(client.items("/tokens")) == 2


STATUSES = [
    (400, MalformedError, Exit.USAGE),
    (401, NotAllowedError, Exit.NOT_ALLOWED),
    (403, NotAllowedError, Exit.NOT_ALLOWED),
    (404, NotFoundError, Exit.NOT_FOUND),
    (409, ConflictError, Exit.CONFLICT),
    (413, MalformedError, Exit.USAGE),
    (418, RelfleetError, Exit.FAILED),
    (422, UsageError, Exit.USAGE),
    (429, UnreachableError, Exit.UNREACHABLE),
    (500, UnreachableError, Exit.UNREACHABLE),
    (502, UnreachableError, Exit.UNREACHABLE),
    (503, UnreachableError, Exit.UNREACHABLE),
    (504, UnreachableError, Exit.UNREACHABLE),
    (507, DiskError, Exit.FAILED),
]


@pytest.mark.parametrize(("status", "kind", "code"), STATUSES, ids=[str(row[0]) for row in STATUSES])
def test_each_status_is_the_error_that_says_what_to_do(client, origin, status, kind, code):
    origin.instead.extend([problem(status)] * ATTEMPTS)
    with pytest.raises(kind) as caught:
        client.get("/whoami")
    assert type(caught.value) is kind
    assert caught.value.exit_code == code
    assert caught.value.reason == "some-reason"
    assert caught.value.then == "then"


@pytest.mark.parametrize("path", ["/metadata/targets", "/trust/root", "/uploads/abc"])
def test_what_keys_and_digests_do_not_vouch_for_is_a_matter_of_trust(client, origin, path):
    origin.instead.extend([problem(422, "bad-signature"), problem(422, "malformed")])
    with pytest.raises(TrustError) as caught:
        client.post(path, b"{}")
    assert caught.value.reason == "bad-signature"
    with pytest.raises(UsageError):
        client.post(path, b"{}")


def test_an_answer_of_something_in_between_is_understood_too(client, origin):
    origin.instead.append(Answer(404, b"<html>nginx</html>"))
    with pytest.raises(NotFoundError) as caught:
        client.get("/whoami")
    assert caught.value.reason == "not-found"
    origin.instead.append(Answer(200, b"<html>hello</html>"))
    with pytest.raises(RelfleetError, match="cannot be read"):
        client.get("/whoami")
    origin.instead.append(Answer(200, b"[]"))
    with pytest.raises(RelfleetError, match="cannot be read"):
        client.items("/products")


def test_without_a_token_the_message_says_to_sign_in(origin, make_client):
    with pytest.raises(NotAllowedError) as caught:
        make_client(origin.url, None).get("/whoami")
    assert "login" in caught.value.then


# --- retries ---


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_get_is_tried_again_while_the_server_is_overloaded(client, origin, waits, status):
    origin.instead.extend([problem(status)] * 3)
    assert client.get("/whoami")["name"] == "ada"
    assert waits == [0.5, 1.0, 2.0]


def test_retries_end(client, origin, waits):
    origin.instead.extend([problem(503)] * 50)
    with pytest.raises(UnreachableError):
        client.get("/whoami")
    assert len(origin.seen) == ATTEMPTS
    assert max(waits) <= MOST_WAIT_S


def test_retry_after_is_honoured(client, origin, waits):
    origin.instead.append(problem(429, **{"Retry-After": "7"}))
    client.get("/whoami")
    assert waits == [7.0]


def test_a_wait_longer_than_there_is_time_for_is_an_answer_at_once(origin, make_client):
    waits = []
    client = make_client(origin.url, timeout_s=5, sleep=waits.append)
    origin.instead.append(problem(503, **{"Retry-After": "3600"}))
    with pytest.raises(UnreachableError) as caught:
        client.get("/whoami")
    assert caught.value.retry_after_s == 3600
    assert waits == []


@pytest.mark.parametrize("status", [502, 503])
def test_a_post_is_sent_again_with_the_same_key(client, origin, waits, status):
    origin.instead.append(problem(status))
    client.post("/products", {"name": "p"})
    assert origin.products == ["p"]
    first, second = [seen.headers["Idempotency-Key"] for seen in origin.calls("POST")]
    assert first == second
    assert len(waits) == 1


def test_a_post_whose_answer_is_lost_is_answered_after_all_and_done_once(client, origin):
    origin.lose_answer_to = "POST /api/v1/products"
    assert client.post("/products", {"name": "p"}) == {"name": "p"}
    assert origin.products == ["p"]
    assert len(origin.calls("POST")) == 2


def test_each_post_has_a_key_of_its_own(client, origin):
    client.post("/products", {"name": "p"})
    client.post("/products", {"name": "q"})
    assert len({seen.headers["Idempotency-Key"] for seen in origin.calls("POST")}) == 2
    client.get("/products")
    assert "Idempotency-Key" not in origin.seen[-1].headers


def test_a_patch_whose_answer_is_lost_is_not_sent_again(client, origin):
    origin.lose_answer_to = "PATCH /api/v1/products"
    with pytest.raises(UnreachableError):
        client.patch("/products", {"name": "p"})
    assert len(origin.calls("PATCH")) == 1


def test_a_get_whose_answer_is_lost_is_sent_again(client, origin):
    origin.lose_answer_to = "GET /api/v1/whoami"
    assert client.get("/whoami")["name"] == "ada"
    assert len(origin.seen) == 2


@pytest.mark.parametrize("method", ["get", "post"])
def test_a_server_that_is_not_there_is_unreachable_after_all_attempts(method, make_client):
    waits = []
    client = make_client(f"http://127.0.0.1:{closed_port()}", sleep=waits.append)
    with pytest.raises(UnreachableError) as caught:
        getattr(client, method)("/whoami")
    assert len(waits) == ATTEMPTS - 1
    assert "refused" in caught.value.why.lower()


def test_waits_are_spread_so_that_clients_do_not_come_back_in_step(origin, make_client):
    waits = []
    spread = iter([0.0, 1.0])
    client = make_client(origin.url, sleep=waits.append, jitter=lambda: next(spread))
    origin.instead.extend([problem(503)] * 2)
    client.get("/whoami")
    assert waits == [0.25, 1.0]


# --- where a token may go ---


def test_redirects_are_refused_and_the_token_stays_here(client, origin):
    origin.instead.append(Answer(302, b"", {"Location": f"{origin.url}/elsewhere"}))
    with pytest.raises(RelfleetError) as caught:
        client.get("/whoami")
    assert caught.value.reason == "redirect"
    assert len(origin.seen) == 1


def test_public_files_are_fetched_without_the_token(client, origin, held):
    answer = client.call("GET", "/metadata/timestamp.json", static=True)
    assert answer.content == origin.files["timestamp.json"]
    seen = origin.calls("GET", "/metadata/")[-1]
    assert "Authorization" not in seen.headers
    assert seen.headers["Accept-Encoding"] == "identity"


def test_a_netrc_never_replaces_the_token(origin, tmp_path, monkeypatch, make_client):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    make_client(origin.url).get("/whoami")
    with pytest.raises(NotAllowedError):
        make_client(origin.url, None).get("/whoami")
    assert [seen.headers.get("Authorization") for seen in origin.seen] == [f"Bearer {TOKEN}", None]


def test_a_certificate_nobody_vouches_for_is_refused_at_once(tmp_path, make_client):
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    command += [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(tmp_path / "k"),
        "-out",
        str(tmp_path / "c"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c", tmp_path / "k")
    listener = socket.create_server(("127.0.0.1", 0))

    def greet():
        connection, _ = listener.accept()
        with connection:
            with contextlib.suppress(OSError):
                context.wrap_socket(connection, server_side=True).close()

    thread = threading.Thread(target=greet)
    thread.start()
    waits = []
    client = make_client(f"https://127.0.0.1:{listener.getsockname()[1]}", sleep=waits.append)
    with pytest.raises(TrustError) as caught:
        client.get("/whoami")
    thread.join(10)
    listener.close()
    assert caught.value.reason == "bad-certificate"
    assert waits == []


@pytest.mark.parametrize(
    "url", ["", "releases.example.org", "ftp://x", "https://", "https://x/?a=b", "file:///etc"]
)
def test_what_is_no_server_is_a_usage_error(url):
    with pytest.raises(UsageError):
        Client(url)


def test_an_address_with_credentials_is_refused_without_them():
    with pytest.raises(UsageError, match="credentials") as caught:
        Client("https://ada:hidden@releases.example.org")
    assert "hidden" not in str(caught.value)


def test_the_client_loads_no_server():
    program = (
        "import sys, release_server.publish.push, release_server.publish.commands.release\n"
        "names = {'flask', 'sqlalchemy', 'alembic', 'granian', 'pydantic'}\n"
        "sys.exit(', '.join(names & set(sys.modules)) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
