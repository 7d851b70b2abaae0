"""Which server, which token, which product: read from flags, environment, `relfleet.toml` and profiles.

Each value is taken from the first place that names it: flag > environment > `./relfleet.toml` > user config.
A profile is a server and the token for it. A stored token is only ever sent to the server it was stored for,
so a `relfleet.toml` from elsewhere cannot carry it off.
"""

from __future__ import annotations

import difflib
import json
import os
import stat
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from agent_core import console, secret_file
from agent_core.errors import (
    NotFoundError,
    RelfleetError,
    SettingsError,
    TrustError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from release_server.publish.client import Client

META = "relfleet.release"
PROJECT_FILE = "relfleet.toml"
DEFAULT = "default"
MAX_TOKEN = 4096


def config_dir(environ: Mapping[str, str]) -> Path:
    """Where a user's profiles, tokens and keys are kept."""
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "relfleet"


def state_dir(environ: Mapping[str, str]) -> Path:
    """Where what can be fetched again is kept: verified metadata."""
    return Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "relfleet"


# --- what was said -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """The options of the call that every `release` command takes; None where nothing was said."""

    server: str | None = None
    profile: str | None = None
    product: str | None = None
    token_file: str | None = None


def server_options() -> list[click.Option]:
    """The options that every `release` command takes besides the common ones."""

    def option(name: str, *names: str, metavar: str, text: str) -> click.Option:
        declared = [f"release_{name}", *names]
        return click.Option(
            declared, expose_value=False, callback=_remember(name), metavar=metavar, help=text
        )

    return [
        option("server", "--server", metavar="URL", text="The release server."),
        option("profile", "--profile", metavar="NAME", text="The profile to use."),
        option("product", "--product", metavar="NAME", text="The product."),
        option("token_file", "--token-file", metavar="FILE", text="Holds the token; - is stdin."),
    ]


def trust_option() -> Callable[[Any], Any]:
    return click.option(
        "--trust",
        type=click.Path(path_type=Path, dir_okay=False),
        help="The trusted root (RELFLEET_TRUST; else the profile's, else root.json beside the keys).",
    )


def _remember(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def store(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        if value is not None:
            ctx.meta[META] = replace(ctx.meta.get(META) or Said(), **{name: value})

    return store


def said() -> Said:
    context = click.get_current_context(silent=True)
    return (context.meta.get(META) if context else None) or Said()


# --- files -------------------------------------------------------------------------------------------------


TABLES = ("product", "server", "build", "health", "hooks", "release")
KEYS = {"product": ("name",), "server": ("url",)}


@dataclass(frozen=True)
class Project:
    """What every command needs of `relfleet.toml`; `build` reads the rest of it."""

    product: str | None = None
    server: str | None = None

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the file of a directory; an empty project when there is none.

        Raises:
            SettingsError: it is not TOML, or names something that does not exist (the nearest is named).
        """
        path = directory / PROJECT_FILE
        document = _read_toml(path)
        _check_names(path, "", document, TABLES)
        found: dict[str, str | None] = {}
        for name, keys in KEYS.items():
            table = document.get(name, {})
            if not isinstance(table, dict):
                raise SettingsError(
                    f"{path}: {name} is not a table", then=f"write [{name}] and {keys[0]} = …"
                )
            _check_names(path, f"{name}.", table, keys)
            found[name] = table.get(keys[0])
            if not isinstance(found[name], str | None):
                raise SettingsError(f"{path}: {name}.{keys[0]} is not a text")
        return cls(**found)


def _check_names(path: Path, above: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {above}{near[0]}?" if near else f"known are {', '.join(known)}"
            raise SettingsError(f"{path}: {above}{key} is not a setting", then=hint, reason="unknown-setting")


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read", why=str(error)) from None


@dataclass(frozen=True)
class Stored:
    """A profile as the user's config keeps it; its token is in a file of its own."""

    server: str
    trust: str | None = None


class Profiles:
    """The user's profiles: `release.toml`, and one 0600 file a token under `tokens/`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "release.toml"

    def all(self) -> dict[str, Stored]:
        """Every profile by name.

        Raises:
            SettingsError: the file cannot be used.
        """
        profiles = _read_toml(self.file).get("profiles", {})
        try:
            return {name: Stored(**entry) for name, entry in profiles.items()}
        except (TypeError, AttributeError) as error:
            raise SettingsError(f"{self.file} cannot be used", why=str(error)) from None

    def save(self, name: str, profile: Stored, token: str) -> None:
        """Keep a profile and its token, in place of an older one of that name."""
        _check_name(name)
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(self._token_file(name), token + "\n", 0o600)
        self._write({**self.all(), name: profile})

    def forget(self, name: str) -> None:
        """Drop a profile and its token.

        Raises:
            NotFoundError: there is none.
        """
        profiles = self.all()
        if name not in profiles:
            raise NotFoundError(f"there is no profile {name}", then="release login makes one")
        self._token_file(name).unlink(missing_ok=True)
        del profiles[name]
        self._write(profiles)

    def token(self, name: str) -> str | None:
        """The token of a profile, or None when it has none.

        Raises:
            TrustError: others can read the file.
        """
        path = self._token_file(name)
        try:
            with path.open() as stream:
                mode = os.fstat(stream.fileno()).st_mode
                text = stream.read(MAX_TOKEN)
        except FileNotFoundError:
            return None
        if mode & 0o077:
            raise TrustError(
                f"the token in {path} is refused",
                why=f"others than its owner can open it (mode {stat.S_IMODE(mode):04o})",
                then="revoke it, and sign in with a new one: release login",
                reason="exposed",
            )
        return _token(text)

    def _token_file(self, name: str) -> Path:
        return self.directory / "tokens" / name

    def _write(self, profiles: Mapping[str, Stored]) -> None:
        lines = []
        for name, profile in sorted(profiles.items()):
            lines.append(f"[profiles.{json.dumps(name)}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in asdict(profile).items() if value]
            lines.append("")
        _write(self.file, "\n".join(lines), 0o600)


def _check_name(name: str) -> None:
    if not name or name.startswith(".") or "/" in name or len(name) > 64:
        raise UsageError(f"{name!r} cannot name a profile", then="use letters, digits and dashes")


def _write(path: Path, text: str, mode: int) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w") as stream:
        os.fchmod(stream.fileno(), mode)
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


# --- the answer --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """Everything a `release` command needs to know of its surroundings.

    Attributes:
        server: its URL, or None when no place names one.
        token: what to sign in with, or None.
        keys_dir: where the release manager's key files are.
        trust: the root to start from; it need not exist.
        state: where verified metadata is kept between calls.
    """

    name: str
    server: str | None
    token: str | None
    product: str | None
    keys_dir: Path
    trust: Path
    state: Path

    def need_server(self) -> str:
        if self.server is None:
            raise UsageError(
                "no server is named",
                then="release login URL, or --server URL, or RELFLEET_SERVER",
                reason="no-server",
            )
        return self.server

    def need_product(self) -> str:
        if self.product is None:
            raise UsageError(
                "no product is named", then="--product NAME, or `release init` writes it into relfleet.toml"
            )
        return self.product


def _stdin() -> str:
    return sys.stdin.read()


def resolve(
    words: Said,
    environ: Mapping[str, str],
    directory: Path,
    *,
    keys_dir: Path | None = None,
    trust: Path | None = None,
    stdin: Callable[[], str] = _stdin,
) -> Profile:
    """Find the server, the token, the product, the keys and the trusted root.

    Args:
        words: the options of the call.
        directory: where `relfleet.toml` is looked for.
        keys_dir, trust: flags of the commands that have them.
        stdin: read when the token file is `-`.

    Raises:
        SettingsError: a file cannot be used.
        NotFoundError: a profile was named that does not exist.
    """
    config = config_dir(environ)
    profiles = Profiles(config)
    known = profiles.all()
    project = Project.read(directory)
    named = words.profile or environ.get("RELFLEET_PROFILE")
    if named is not None and named not in known:
        raise NotFoundError(f"there is no profile {named}", then=f"release login URL --profile {named}")
    server = words.server or environ.get("RELFLEET_SERVER") or project.server
    if server is None and (chosen := known.get(named or DEFAULT)) is not None:
        server = chosen.server
    server = server.rstrip("/") if server else None
    name = named or next((key for key, entry in sorted(known.items()) if entry.server == server), DEFAULT)
    stored = known.get(name)
    if stored is not None and stored.server != server:
        stored = None
    token = given_token(words, environ, stdin) or (profiles.token(name) if stored else None)
    keys = keys_dir or _path(environ.get("RELFLEET_KEYS")) or config / "keys"
    root = trust or _path(environ.get("RELFLEET_TRUST")) or _path(stored.trust if stored else None)
    root = root or keys / "root.json"
    product = words.product or environ.get("RELFLEET_PRODUCT") or project.product
    return Profile(name, server, token, product, keys, root, state_dir(environ))


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def given_token(words: Said, environ: Mapping[str, str], stdin: Callable[[], str] = _stdin) -> str | None:
    named = words.token_file or environ.get("RELFLEET_TOKEN_FILE")
    if named == "-":
        return _token(stdin())
    if named:
        return _token(secret_file.read(Path(named), "token"))
    return _token(environ.get("RELFLEET_TOKEN", "")) or None


def _token(text: str) -> str:
    token = text.strip()
    if any(not 33 <= ord(letter) <= 126 for letter in token):
        raise UsageError("the token cannot be used", why="it holds something else than one word")
    return token


def current(*, keys_dir: Path | None = None, trust: Path | None = None) -> Profile:
    """The profile of the running command."""
    return resolve(said(), os.environ, Path.cwd(), keys_dir=keys_dir, trust=trust)


def connect(profile: Profile | None = None) -> Client:
    """A client of the server that the running command should talk to.

    Raises:
        UsageError: no server is named.
        RelfleetError: the libraries for it are not installed.
    """
    found = profile or current()
    server = found.need_server()
    try:
        from release_server.publish.client import Client
    except ModuleNotFoundError as error:
        raise RelfleetError(
            "the commands of release managers need a library that is not installed",
            why=f"there is no module {error.name}",
            then="pip install 'relfleet[cli]'",
            reason="missing-library",
        ) from error
    client = Client(server, found.token, timeout_s=console.options().timeout_s)
    if (context := click.get_current_context(silent=True)) is not None:
        context.find_root().call_on_close(client.close)
    return client
