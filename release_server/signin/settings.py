"""The settings of signing in, checked as one: a provider that cannot be trusted is refused at the start."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from agent_core.errors import SettingsError
from agent_core.settings import Setting
from release_server.signin.rules import Rule

if TYPE_CHECKING:
    from pathlib import Path

    from agent_core.settings import Settings

CALLBACK = "/signin/callback"
MOST_SECRET = 4096

TABLE = [
    Setting(
        "oidc.issuer",
        str,
        "",
        "the OpenID provider that people sign in with, as it names itself; empty: tokens only",
        form=r"https?://[^\s?#]+",
    ),
    Setting("oidc.client_id", str, "", "what the provider calls this server"),
    Setting(
        "oidc.client_secret_file",
        str,
        "",
        "file with the client secret, mode 0600; empty: a public client, held by PKCE alone",
    ),
    Setting("oidc.ca_file", str, "", "PEM certificates to verify the provider with; empty: the public ones"),
    Setting(
        "oidc.proxy",
        str,
        "",
        "proxy on the way to the provider, with its password if it needs one; empty: none, whatever the"
        " environment says",
        secret=True,
        form=r"http://[^\s]+",
    ),
    Setting("oidc.scopes", list, ["openid", "email"], "what is asked of the provider"),
    Setting(
        "oidc.name_claim",
        str,
        "email",
        "claim of the ID token that a person is called by; must be one that people cannot choose",
        form=r"\S{1,64}",
    ),
    Setting(
        "oidc.roles",
        list,
        [],
        "who may do what, the first that fits: `operator: groups=fleet`, `admin: email=ada@example.org`",
    ),
    Setting(
        "oidc.session_s", float, 12 * 3600.0, "after which one signs in again", "s", low=300, high=604_800
    ),
    Setting(
        "oidc.idle_s", float, 3600.0, "after which an unused sign-in is over", "s", low=120, high=604_800
    ),
]


def is_loopback(url: str) -> bool:
    """Whether a URL names this host, so that nobody is between."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def is_safe(url: str) -> bool:
    """Whether nobody on the way can read or change what is sent there."""
    return url.startswith("https://") or (url.startswith("http://") and is_loopback(url))


def origin_of(url: str) -> str:
    """A URL's origin as browsers write it in `Origin`."""
    parts = urlsplit(url.lower())
    usual = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return f"{parts.scheme}://{parts.netloc.removesuffix(usual) if usual else parts.netloc}"


@dataclass(frozen=True)
class Oidc:
    """What is set about the provider.

    Attributes:
        site: the URL that people open; the provider sends them back below it.
        secret_file, ca_file: None for none.
        proxy: for what is asked by https; empty for none.
    """

    issuer: str
    client_id: str
    site: str
    secret_file: Path | None
    ca_file: Path | None
    scopes: tuple[str, ...]
    name_claim: str
    rules: tuple[Rule, ...]
    lasts: timedelta
    idle: timedelta
    proxy: str = ""

    @classmethod
    def of(cls, settings: Settings, data: Path, site: str) -> Oidc | None:
        """Read them; None where no issuer is set.

        Raises:
            SettingsError: they could let in the wrong one, or nobody.
        """
        if not settings["oidc.issuer"]:
            return None
        made = cls(
            issuer=str(settings["oidc.issuer"]),
            client_id=str(settings["oidc.client_id"]),
            site=site,
            secret_file=_place(data, settings["oidc.client_secret_file"]),
            ca_file=_place(data, settings["oidc.ca_file"]),
            scopes=tuple(settings["oidc.scopes"]),
            name_claim=str(settings["oidc.name_claim"]),
            rules=tuple(Rule.read(text) for text in settings["oidc.roles"]),
            lasts=timedelta(seconds=settings["oidc.session_s"]),
            idle=timedelta(seconds=settings["oidc.idle_s"]),
            proxy=str(settings["oidc.proxy"]),
        )
        made._check()
        return made

    @property
    def callback(self) -> str:
        """Where the provider sends people back to; never built from what a request says."""
        return self.site + CALLBACK

    def rule(self, text: str) -> Rule | None:
        """The rule of this text, when it still holds."""
        return next((rule for rule in self.rules if rule.text == text), None)

    def _check(self) -> None:
        for name, url in (("oidc.issuer", self.issuer), ("server.url", self.site)):
            if not is_safe(url):
                raise SettingsError(
                    f"{name} cannot be used for signing in",
                    why=f"{url} is neither https nor on this host, so others could read along",
                    then=f"give {name} an https URL",
                )
        empty = "it is empty, and oidc.issuer is not"
        for name, right, why in (
            ("client_id", self.client_id, empty),
            ("roles", self.rules, empty),
            ("name_claim", self.name_claim, empty),
            ("scopes", "openid" in self.scopes, "it lacks `openid`"),
        ):
            if not right:
                raise SettingsError(
                    f"oidc.{name} cannot be used", why=why, then="set it, or leave oidc.issuer empty"
                )

    def secret(self) -> str:
        """The client secret; empty for a public client.

        Raises:
            SettingsError: the file is missing or empty, or others on this host can open it.
        """
        if self.secret_file is None:
            return ""
        try:
            with self.secret_file.open("rb") as file:
                status = os.fstat(file.fileno())
                text = file.read(MOST_SECRET + 1).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise _refused(f"{self.secret_file}: {why}", "check oidc.client_secret_file") from error
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
            raise _refused(
                f"others on this host can open {self.secret_file}", f"chmod 600 {self.secret_file}"
            )
        if not 0 < len(text) <= MOST_SECRET or not text.isprintable():
            raise _refused(
                f"{self.secret_file} is not one line of text", "write the secret there, and nothing else"
            )
        return text

    def check_files(self) -> None:
        """Read the files once, so that what is wrong with them is said at the start.

        Raises:
            SettingsError: a file is missing, or the secret is open to others.
        """
        import ssl

        self.secret()
        if self.ca_file is not None:
            try:
                ssl.create_default_context(cafile=str(self.ca_file))
            except (OSError, ssl.SSLError) as error:
                raise SettingsError(
                    "oidc.ca_file cannot be used", why=f"{self.ca_file}: {error}", then="name a PEM file"
                ) from error


def _place(data: Path, named: object) -> Path | None:
    return data / str(named) if named else None


def _refused(why: str, then: str) -> SettingsError:
    return SettingsError("the client secret cannot be used", why=why, then=then)
