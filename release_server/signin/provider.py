"""The OpenID provider: where people are sent, and what it must prove about those who come back.

Authorization code with PKCE (S256), state and nonce. What is believed is the ID token alone, and of it only
what the provider's own keys have signed for this server and this attempt.
"""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import BadSignatureError, ClaimError, ExpiredTokenError, InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet
from requests import RequestException

from agent_core.errors import NotAllowedError, UnreachableError
from release_server import outgoing
from release_server.signin.rules import MOST_SUBJECT
from release_server.signin.settings import is_loopback, is_safe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from joserfc.jwk import Key
    from joserfc.jws import CompactSignature

    from release_server.signin.flow import Attempt
    from release_server.signin.settings import Oidc

ALGORITHMS = ("RS256", "PS256", "ES256")
"""Signatures by a key that only the provider has. Never `none` or HS256, whose key this server knows too."""
METADATA_LASTS = timedelta(hours=1)
KEYS_LAST = timedelta(hours=1)
LEAST_BETWEEN_KEYS = timedelta(seconds=30)
"""However many tokens name a key that is not known."""
LEEWAY_S = 60
"""By which the provider's clock may differ."""
OLDEST_S = 600
AT_ONCE = 4
"""Requests of this process to the provider; a slow one must not hold all the threads that answer agents."""
BLAMED = {"iss": "signin-issuer", "aud": "signin-audience", "azp": "signin-audience", "nonce": "signin-nonce"}
LONGEST_S = 6.0
"""For one answer of the provider as a whole."""
CODE_WORD = re.compile(r"[a-z_]{1,40}")


@dataclass(frozen=True)
class Metadata:
    """What the provider says of itself in its discovery document."""

    authorization: str
    token: str
    keys: str
    by_body: bool
    until: datetime


@dataclass(frozen=True)
class Keys:
    known: KeySet
    fetched: datetime


class Provider:
    """One provider; asks it only when somebody signs in. Safe to use from many threads."""

    def __init__(self, oidc: Oidc) -> None:
        self.oidc = oidc
        self._secret = oidc.secret()
        self._room = threading.BoundedSemaphore(AT_ONCE)
        self._metadata: Metadata | None = None
        self._keys: Keys | None = None

    def where(self, attempt: Attempt, now: datetime) -> str:
        """The URL at the provider where somebody signs in.

        Raises:
            UnreachableError: `signin-unavailable`; it is away, slow, or says nothing that can be used.
        """
        metadata = self._discover(now)
        with self._client(metadata) as client:
            url, _ = client.create_authorization_url(
                metadata.authorization,
                state=attempt.state,
                nonce=attempt.nonce,
                code_verifier=attempt.verifier,
            )
        return str(url)

    def redeem(self, attempt: Attempt, code: str, now: datetime) -> Mapping[str, Any]:
        """The claims of who signed in, verified.

        Raises:
            NotAllowedError: `signin-code` or another reason `signin-…`: what came proves nobody.
            UnreachableError: `signin-unavailable`.
        """
        metadata = self._discover(now)
        with self._asking(), self._client(metadata) as client:
            try:
                answer = client.fetch_token(
                    metadata.token,
                    grant_type="authorization_code",
                    code=code,
                    code_verifier=attempt.verifier,
                    allow_redirects=False,
                )
            except OAuthError as error:
                raise refused(f"the provider refuses the code ({word(error.error)})", "signin-code") from None
        token = answer.get("id_token")
        if not isinstance(token, str):
            raise refused("the provider sent no ID token", "signin-token")
        return self._verify(token, attempt, str(answer.get("access_token") or ""), now)

    # --- the ID token ------------------------------------------------------------------------------------

    def _verify(self, text: str, attempt: Attempt, access_token: str, now: datetime) -> Mapping[str, Any]:
        signed = self._open(text, now)
        claims = CodeIDToken(
            signed.claims,
            signed.header,
            {"iss": {"value": self.oidc.issuer}},
            {"nonce": attempt.nonce, "client_id": self.oidc.client_id, "access_token": access_token},
        )
        try:
            claims.validate(now=int(now.timestamp()), leeway=LEEWAY_S)
        except ExpiredTokenError:
            raise refused("the ID token is past its time", "signin-expired") from None
        except ClaimError as error:
            reason = BLAMED.get(error.claim, "signin-token")
            raise refused(f"the ID token's {word(error.claim)} is not what it must be", reason) from None
        self._check_further(signed.claims, now)
        return signed.claims

    def _check_further(self, claims: Mapping[str, Any], now: datetime) -> None:
        """What the specification leaves open, taken strictly."""
        if claims["aud"] not in (self.oidc.client_id, [self.oidc.client_id]):
            raise refused("the ID token is for others as well", "signin-audience")
        if claims["iat"] < now.timestamp() - OLDEST_S:
            raise refused("the ID token is not of now", "signin-expired")
        if not 0 < len(claims["sub"]) <= MOST_SUBJECT or not claims["sub"].isprintable():
            raise refused("the ID token's sub is not what it must be", "signin-token")

    def _open(self, text: str, now: datetime) -> jwt.Token:
        """Verify the signature, with keys fetched anew when they lack the one that is named."""
        try:
            try:
                return jwt.decode(text, self._picker(now), algorithms=ALGORITHMS)
            except InvalidKeyIdError:
                return jwt.decode(text, self._picker(now, anew=True), algorithms=ALGORITHMS)
        except InvalidKeyIdError:
            raise refused("the provider does not show the key of the ID token", "signin-key") from None
        except BadSignatureError:
            raise refused("the ID token's signature is wrong", "signin-signature") from None
        except (JoseError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise refused(f"the ID token cannot be used ({type(error).__name__})", "signin-token") from None

    def _picker(self, now: datetime, *, anew: bool = False) -> Any:
        keys = self._current_keys(now, anew=anew)

        def pick(signed: CompactSignature) -> Key:
            kid = signed.headers().get("kid")
            if not isinstance(kid, str):  # the library would guess
                raise InvalidKeyIdError("no kid")
            return keys.get_by_kid(kid, {"use": "sig"})

        return pick

    def _current_keys(self, now: datetime, *, anew: bool) -> KeySet:
        had = self._keys
        if had is not None:
            age = now - had.fetched
            if age < (LEAST_BETWEEN_KEYS if anew else KEYS_LAST):
                return had.known
        document = self._fetch(self._discover(now).keys)
        try:
            found = KeySet.import_key_set(document)  # type: ignore[arg-type]
        except (JoseError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise unavailable("its keys cannot be read") from error
        self._keys = Keys(found, now)
        return found

    # --- asking ------------------------------------------------------------------------------------------

    def _discover(self, now: datetime) -> Metadata:
        if self._metadata is None or self._metadata.until <= now:
            document = self._fetch(f"{self.oidc.issuer.rstrip('/')}/.well-known/openid-configuration")
            self._metadata = self._read(document, now + METADATA_LASTS)
        return self._metadata

    def _read(self, document: Mapping[str, Any], until: datetime) -> Metadata:
        if document.get("issuer") != self.oidc.issuer:
            raise unavailable("it names itself otherwise than oidc.issuer does")
        places = [document.get(name) for name in ("authorization_endpoint", "token_endpoint", "jwks_uri")]
        here = is_loopback(self.oidc.issuer)
        for place in places:
            if not isinstance(place, str) or not is_safe(place) or (is_loopback(place) and not here):
                raise unavailable("it names a place that cannot be used in its discovery document")
        if "S256" not in document.get("code_challenge_methods_supported", ["S256"]):
            raise unavailable("it does not take PKCE with S256")
        methods = document.get("token_endpoint_auth_methods_supported") or ["client_secret_basic"]
        by_body = "client_secret_basic" not in methods and "client_secret_post" in methods
        authorization, token, keys = map(str, places)
        return Metadata(authorization, token, keys, by_body, until)

    def _fetch(self, url: str) -> Mapping[str, Any]:
        """One JSON object of the provider's."""
        with self._asking(), self._client(None) as client:
            answer = client.get(url, withhold_token=True, allow_redirects=False)
            if answer.status_code != 200:
                raise unavailable(f"it answers {answer.status_code}")
            found = answer.json()
        if not isinstance(found, dict):
            raise unavailable("it answers something else than JSON objects")
        return found

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Around what asks the provider: few at once, and each way to fail has one name."""
        if not self._room.acquire(blocking=False):
            raise unavailable("others wait for it already")
        try:
            yield
        except (ValueError, RecursionError) as error:  # first: errors of JSON are of the network's as well
            raise unavailable("it answers something else than JSON objects") from error
        except (RequestException, OSError) as error:
            raise unavailable(f"it does not answer ({type(error).__name__})") from error
        finally:
            self._room.release()

    def _client(self, metadata: Metadata | None) -> Any:
        method = "client_secret_post" if metadata and metadata.by_body else "client_secret_basic"
        client = OAuth2Session(
            self.oidc.client_id,
            self._secret or None,
            token_endpoint_auth_method=method if self._secret else "none",
            scope=" ".join(self.oidc.scopes),
            redirect_uri=self.oidc.callback,
            code_challenge_method="S256",
        )
        outgoing.guard(
            client,
            lambda: outgoing.Bounded(unavailable, LONGEST_S),
            str(self.oidc.ca_file) if self.oidc.ca_file else None,
            self.oidc.proxy,
        )
        return client


def word(said: object) -> str:
    """A word of the provider's or of a URL's, if it is one: what is shown and logged is never more."""
    return said if isinstance(said, str) and CODE_WORD.fullmatch(said) else "unknown"


def refused(why: str, reason: str) -> NotAllowedError:
    return NotAllowedError("you are not signed in", why=why, then="sign in again", reason=reason)


def unavailable(why: str) -> UnreachableError:
    return UnreachableError(
        "the provider cannot be asked",
        why=why,
        then="try again later; a token works without it",
        reason="signin-unavailable",
    )
