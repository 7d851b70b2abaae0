"""A real OpenID provider on loopback: authlib's own server side, with keys, a JWKS and PKCE, over HTTP.

What it does right it does by the library. A test makes it do one thing wrong: another claim, another key or
algorithm, an answer without end. `person` is who sits before the browser; nobody is asked for a password.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from functools import cache

from authlib.integrations.flask_oauth2 import AuthorizationServer
from authlib.oauth2.rfc6749.grants import AuthorizationCodeGrant
from authlib.oauth2.rfc7636 import CodeChallenge
from authlib.oidc.core import OpenIDCode, UserInfo
from flask import Flask, Response, jsonify, request
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OctKey, RSAKey
from werkzeug.serving import WSGIRequestHandler, make_server

from agent_core import clock

CLIENT = "relfleet"
SECRET = "the client's secret, which no log may hold"

ADA = {
    "sub": "u-1",
    "email": "ada@example.org",
    "email_verified": True,
    "groups": ["engineers", "fleet-operators"],
}
EVE = {"sub": "u-9", "email": "eve@example.org", "email_verified": True, "groups": ["guests"]}


class Client:
    """The one client that is registered."""

    def __init__(self, provider):
        self.provider = provider
        self.client_id = CLIENT
        self.token_endpoint_auth_method = "client_secret_basic"

    def get_client_id(self):
        return CLIENT

    def get_default_redirect_uri(self):
        return self.provider.redirect_uri

    def get_allowed_scope(self, scope):
        return " ".join(name for name in scope.split() if name in ("openid", "email", "groups"))

    def check_redirect_uri(self, uri):
        return uri == self.provider.redirect_uri

    def check_client_secret(self, secret):
        return secret == SECRET

    def check_endpoint_auth_method(self, method, endpoint):
        return method == self.provider.auth_method

    def check_response_type(self, kind):
        return kind == "code"

    def check_grant_type(self, kind):
        return kind == "authorization_code"


@dataclass
class Code:
    """An authorization code that was given out."""

    code: str
    redirect_uri: str
    scope: str
    user: dict
    nonce: str
    code_challenge: str
    code_challenge_method: str

    def get_redirect_uri(self):
        return self.redirect_uri

    def get_scope(self):
        return self.scope

    def get_nonce(self):
        return self.nonce

    def get_auth_time(self):
        return None

    get_acr = get_amr = get_auth_time


class Grant(AuthorizationCodeGrant):
    TOKEN_ENDPOINT_AUTH_METHODS = ("client_secret_basic", "client_secret_post")

    @property
    def provider(self):
        return self.server.provider

    def save_authorization_code(self, code, request):
        said = request.payload.data
        self.provider.codes[code] = Code(
            code,
            request.payload.redirect_uri,
            request.payload.scope,
            request.user,
            said.get("nonce", ""),
            said.get("code_challenge", ""),
            said.get("code_challenge_method", ""),
        )

    def query_authorization_code(self, code, client):
        return self.provider.codes.get(code)

    def delete_authorization_code(self, code):
        if not self.provider.codes_last:
            del self.provider.codes[code.code]

    def authenticate_user(self, code):
        return code.user


class Tokens(OpenIDCode):
    def __init__(self, provider):
        super().__init__(require_nonce=True)
        self.provider = provider

    def exists_nonce(self, nonce, request):
        return any(code.nonce == nonce for code in self.provider.codes.values())

    def get_client_algorithm(self, client):
        return self.provider.key.alg

    def get_encode_header(self, client):
        return {"alg": self.provider.key.alg, "kid": self.provider.key.kid}

    def get_client_claims(self, client):
        now = int(self.provider.clock().timestamp())
        return {"iss": self.provider.issuer, "aud": CLIENT, "iat": now, "exp": now + 300}

    def resolve_client_private_key(self, client):
        return self.provider.key

    def generate_user_info(self, user, scope):
        return UserInfo({"sub": user["sub"]} | {name: user[name] for name in user if name != "sub"})

    def encode_id_token(self, token, request):
        """By the library; where a test wants another token, that one is signed for real as well."""
        text = super().encode_id_token(token, request)
        return self.provider.spoil(text) if self.provider.spoil else text


@dataclass(eq=False)
class Provider:
    """The provider; what tests change is public.

    Attributes:
        tls: certificate and key, or None for HTTP.
        person: who signs in at it.
        key: what it signs with.
        shown: the keys in its JWKS.
        spoil: given the right ID token, returns another.
        answers: given a path, a response in the place of the right one.
        asked: the paths that were asked for.
    """

    redirect_uri: str = ""
    clock: object = clock.now
    tls: object = None

    def __post_init__(self):
        self.begin_anew()
        self._server = make_server(
            "127.0.0.1", 0, self._app(), threaded=True, request_handler=Quiet, ssl_context=self.tls
        )
        self.issuer = f"{'https' if self.tls else 'http'}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def begin_anew(self):
        """As a new one, at the same address."""
        self.auth_method, self.person, self.key = "client_secret_basic", dict(ADA), usual_key()
        self.shown, self.spoil, self.codes_last = [self.key], None, False
        self.answers, self.codes, self.asked, self.said_of_itself = {}, {}, [], {}

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _app(self):
        app = Flask("provider", static_folder=None)
        server = AuthorizationServer(app, query_client=lambda _: Client(self), save_token=lambda *_: None)
        server.provider = self
        server.register_grant(Grant, [Tokens(self), CodeChallenge(required=True)])

        @app.before_request
        def _note():
            self.asked.append(request.path)
            other = self.answers.get(request.path)
            return other() if other else None

        @app.get("/.well-known/openid-configuration")
        def _discovery():
            return jsonify(
                {
                    "issuer": self.issuer,
                    "authorization_endpoint": f"{self.issuer}/authorize",
                    "token_endpoint": f"{self.issuer}/token",
                    "jwks_uri": f"{self.issuer}/keys",
                    "response_types_supported": ["code"],
                    "code_challenge_methods_supported": ["S256"],
                    "token_endpoint_auth_methods_supported": [self.auth_method],
                    "id_token_signing_alg_values_supported": ["RS256", "ES256"],
                }
                | self.said_of_itself
            )

        @app.get("/keys")
        def _keys():
            return jsonify(KeySet(self.shown).as_dict(private=False))

        @app.get("/authorize")
        def _authorize():
            grant = server.get_consent_grant(end_user=self.person)
            return server.create_authorization_response(grant_user=self.person, grant=grant)

        @app.post("/token")
        def _token():
            return server.create_token_response()

        return app


class Quiet(WSGIRequestHandler):
    def log(self, *_):
        pass


@cache
def usual_key():
    return rsa("rsa-1")


def rsa(kid, alg="RS256"):
    return RSAKey.generate_key(2048, {"kid": kid, "use": "sig", "alg": alg})


def ec(kid):
    return ECKey.generate_key("P-256", {"kid": kid, "use": "sig", "alg": "ES256"})


def claims_of(text):
    """What a token says, without looking at its signature."""
    part = text.split(".")[1]
    return json.loads(urlsafe_b64decode(part + "=" * (-len(part) % 4)))


def signed_with(key, alg, **changed):
    """A spoiler: the same claims but for those changed (None: taken out), signed by `key`."""

    def spoil(text):
        said = claims_of(text) | changed
        said = {name: value for name, value in said.items() if value is not None}
        return jwt.encode({"alg": alg, "kid": key.kid}, said, key, [alg])

    return spoil


def unsigned(text):
    """The token with `alg: none` and no signature; by hand, since the library warns of making one."""
    head = urlsafe_b64encode(json.dumps({"alg": "none", "kid": "rsa-1"}).encode()).rstrip(b"=")
    return f"{head.decode()}.{text.split('.')[1]}."


def changed(**claims):
    """A spoiler: signed by the right key, but with other claims."""

    def spoil(text):
        return signed_with(usual_key(), "RS256", **claims)(text)

    return spoil


def by_secret(text):
    """HS256 with the client's secret, which both ends know."""
    key = OctKey.import_key(SECRET, {"kid": "rsa-1"})
    return jwt.encode({"alg": "HS256", "kid": "rsa-1"}, claims_of(text), key, ["HS256"])


def endless():
    def forever():
        while True:
            yield b" " * 65_536

    return Response(forever(), content_type="application/json")


@contextlib.contextmanager
def dripping(head=b""):
    """A port that answers one byte at a time, without `head` in the head of its answer; yields its URL."""
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    threads = []

    def drip(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(65_536)
            connection.sendall(head or b"HTTP/1.1 200 OK\r\nX-Drip: ")
            while not stop.wait(0.05):
                connection.sendall(b" ")

    def serve():
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                threads.append(threading.Thread(target=drip, args=[listener.accept()[0]]))
                threads[-1].start()

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        serving.join()
        for thread in threads:
            thread.join()
        listener.close()
