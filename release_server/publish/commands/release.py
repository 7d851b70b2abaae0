"""The commands of release managers: from a product's source to a published release."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from agent_core import console
from agent_core.errors import ConflictError, NotAllowedError, NotFoundError, UnreachableError, UsageError
from agent_core.wire import NAME
from keys.cli import keys_dir_option, passphrase_option, passphrases
from release_server.publish import profile as profiles
from release_server.publish import render
from release_server.publish.commands.trust import tell_waiting
from release_server.publish.profile import PROJECT_FILE, Profile, Profiles, Stored, connect, trust_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from release_server.publish.push import Outcome
    from release_server.publish.sign import Release, Trusted

DIST = "dist"
ARCHIVE_SUFFIX = ".tar.zst"

TEMPLATE = """\
# What `release` knows of this product. Flags and RELFLEET_… variables come before it.

[product]
name = {product}

[server]
{server}

[build]
source = "app"                          # becomes app/ in the bundle
entry = ["{{python}}", "app/main.py"]     # how the workload is started
vendor = []                             # distributions to carry along, e.g. "requests>=2.32"

[health]
observe_s = 60                          # how long a new version must stay good before it is kept
checks = [{{ kind = "process" }}]

# [release]                             # what a release says of itself
# deltas = 3                            # from how many earlier releases devices can go on by a delta; 0: none

# [hooks]                               # programs that may refuse a version, or take it back
# pre_activate = {{ argv = ["{{python}}", "app/check.py"], timeout_s = 60 }}
# post_activate = {{ argv = ["{{python}}", "app/migrate.py"], timeout_s = 60 }}
"""


# --- surroundings ------------------------------------------------------------------------------------------


@click.command("init")
@click.argument("product", required=False)
@click.option("--force", is_flag=True, help="Write over an existing file.")
def init(product: str | None, *, force: bool) -> None:
    """Write relfleet.toml in this directory.

    PRODUCT is the name of the agent program, e.g. warehouse-agent; the directory's name when left out.
    """
    words = profiles.said()
    name = product or words.product or Path.cwd().name.lower().replace(" ", "-").replace("_", "-")
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a product", why="names are lower case: a-z, 0-9, dot, dash and underscore"
        )
    path = Path(PROJECT_FILE)
    if path.exists() and not force:
        raise ConflictError(f"{PROJECT_FILE} exists", then="edit it, or --force to begin anew")
    server = words.server or os.environ.get("RELFLEET_SERVER")
    line = f"url = {json.dumps(server)}" if server else '# url = "https://releases.example.org"'
    path.write_text(TEMPLATE.format(product=json.dumps(name), server=line))
    console.say(f"wrote {path}; next: release key gen, then release build --version 1.0.0")
    console.emit({"path": str(path), "product": name, "server": server}, str(path))


@click.command("login")
@click.argument("server", required=False)
@click.option(
    "--trust",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The trusted root that a colleague made; kept with the profile.",
)
def login(server: str | None, trust: Path | None) -> None:
    """Sign in to SERVER with a token from --token-file, stdin (-), RELFLEET_TOKEN, or a prompt.

    The server and the token are kept as the profile `default`, or as --profile NAME.
    """
    words = profiles.said()
    directory = profiles.config_dir(os.environ)
    name = words.profile or os.environ.get("RELFLEET_PROFILE") or profiles.DEFAULT
    unnamed = profiles.Said(server or words.server, None, words.product, words.token_file)
    environ = {key: value for key, value in os.environ.items() if key != "RELFLEET_PROFILE"}
    url = profiles.resolve(profiles.Said(unnamed.server), environ, Path.cwd()).need_server()
    token = profiles.given_token(unnamed, os.environ) or _ask_token(url)
    if url.startswith("http://") and not _is_local(url):
        console.warn(f"{url} is not https: the token crosses the network in the clear")
    who = connect(Profile(name, url, token, None, directory, directory, directory)).get("/whoami")
    kept = Stored(url, str(trust.resolve()) if trust else None)
    Profiles(directory).save(name, kept, token)
    console.say(f"signed in to {url} as {who['name']} ({who['role']}), kept as profile {name}")
    console.emit({"server": url, "profile": name, **who}, lambda: f"{who['name']}  {who['role']}")


def _ask_token(url: str) -> str:
    if not console.can_ask():
        raise NotAllowedError(
            "a token is needed",
            why="there is no terminal to ask on",
            then="--token-file FILE (- is stdin), or RELFLEET_TOKEN",
            reason="no-token",
        )
    typed: str = click.prompt(f"Token for {url}", hide_input=True, err=True)
    return typed.strip()


def _is_local(url: str) -> bool:
    from urllib.parse import urlsplit

    host = urlsplit(url).hostname or ""
    return host == "localhost" or host.startswith("127.") or host == "::1"


@click.command("logout")
def logout() -> None:
    """Forget a profile and its token. The token itself holds until it expires or is revoked."""
    name = profiles.said().profile or os.environ.get("RELFLEET_PROFILE") or profiles.DEFAULT
    Profiles(profiles.config_dir(os.environ)).forget(name)
    console.say(f"profile {name} forgotten")


@click.command("whoami")
def whoami() -> None:
    """Say who the server takes you for, and where that comes from."""
    found = profiles.current()
    who = connect(found).get("/whoami")
    console.emit({"server": found.server, "profile": found.name, **who})


# --- bundles -----------------------------------------------------------------------------------------------


@click.command("build")
@click.argument("path", type=click.Path(path_type=Path, file_okay=False, exists=True), default=".")
@click.option("--version", required=True, help="The version of the product that is built.")
@click.option("--platform", help="The platform; this host's when left out.")
@click.option("--entry", help="How the workload is started, instead of what relfleet.toml says.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where to; dist/ by default.")
def build(path: Path, version: str, platform: str | None, entry: str | None, out: Path | None) -> None:
    """Make a bundle of the product in PATH, where its relfleet.toml is, and print its digest."""
    from release_server.publish import build as builder
    from release_server.publish.push import size

    built = builder.build(path, version, platform=platform, entry=entry, out=out, progress=_step)
    made = {
        "archive": str(built.archive),
        "index": str(built.index_file),
        "product": built.index.product,
        "version": built.index.version,
        "platform": built.index.platform,
        "sha256": built.sha256,
        "length": built.length,
        "index_sha256": built.index_sha256,
        "files": len(built.index.files),
        "unpacked": built.index.unpacked,
    }
    console.say(f"built {built.archive}  {size(built.length)}, {len(built.index.files)} files")
    console.emit(made, built.sha256)


def _step(step: str, done: int, total: int) -> None:
    if console.options().verbose:
        console.say(f"{step} ({done}/{total})")


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path, dir_okay=False), nargs=-1, required=True)
def verify(bundle: tuple[Path, ...]) -> None:
    """Check bundles as a device would: every byte against the index beside the archive."""
    from release_server.publish import push

    checked = []
    for archive in bundle:
        release = push.load(archive)
        facts = release.facts
        checked.append(
            {
                "archive": str(archive),
                "product": facts.product,
                "version": facts.version,
                "platform": facts.platform,
                "sha256": release.archive.sha256,
                "index_sha256": facts.index_sha256,
                "files": facts.files,
            }
        )
    console.emit(
        checked, lambda: "\n".join(f"ok  {entry['sha256']}  {entry['archive']}" for entry in checked)
    )


@click.command("push")
@click.argument("bundle", type=click.Path(path_type=Path, exists=True), nargs=-1)
@click.option("--version", help="With a directory: build this version first.")
@click.option("--to", "cohort", metavar="COHORT", help="Start a rollout to this cohort, in default steps.")
@click.option("--notes", type=click.File("r"), help="A text for people, signed with the release; - is stdin.")
@click.option("--gate", "gates", multiple=True, metavar="NAME", help="Only for agents behind this gate.")
@click.option("--barrier", is_flag=True, help="No agent goes past this release without having run it.")
@click.option("--dry-run", is_flag=True, help="Check everything and change nothing.")
@click.option(
    "--signed",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Sign nothing here: bring what `release sign` wrote.",
)
@click.option(
    "--wait",
    is_flag=True,
    help="Fail when it is not published in time (--timeout, else 60 s), approvals included.",
)
@trust_option()
@keys_dir_option()
@passphrase_option()
def push(
    bundle: tuple[Path, ...],
    *,
    version: str | None,
    cohort: str | None,
    notes: Any,
    gates: tuple[str, ...],
    barrier: bool,
    trust: Path | None,
    keys_dir: Path | None,
    passphrase_file: Path | None,
    signed: Path | None,
    dry_run: bool,
    wait: bool,
) -> None:
    """Sign, upload and publish the BUNDLEs of one version, one for each platform.

    A directory stands for the one bundle in its dist/, or with --version for what is built of it. A push that
    was cut short goes on when the same command is run again; a version that is published never changes.
    Where others have to sign as well, it ends when it is staged; with --to it ends with 8 then, and the same
    command starts the rollout once they have signed.
    """
    from keys import ceremony
    from release_server.publish import push as pushing
    from release_server.publish import sign

    found = profiles.current(keys_dir=keys_dir, trust=trust)
    client = connect(found)
    root = sign.read_trust(found.trust)
    text = notes.read() if notes else ""
    releases = releases_of(bundle or (Path(),), version, gates, text, barrier=barrier)

    def opened(trusted: Trusted) -> Sequence[Any]:
        return sign.release_signers(found.keys_dir, trusted.root.signed, passphrases(passphrase_file))

    with pushing.progress_bar() as progress:
        outcome = pushing.push(
            client,
            releases,
            trust=root,
            state=found.state,
            signers=opened,
            signed=ceremony.parse_targets(signed.read_bytes()) if signed else None,
            dry_run=dry_run,
            wait_s=console.options().timeout_s or pushing.PUBLISH_S,
            must_publish=wait or cohort is not None,
            wait_for_others=wait,
            deltas=_deltas(),
            progress=progress,
        )
    if cohort is not None and not dry_run and outcome.state != "staged":
        outcome.rollout = pushing.start_rollout(client, outcome.product, outcome.version, cohort)
    _tell_push(outcome, client.url, cohort)
    if cohort is not None and outcome.state == "staged":
        raise _no_rollout_yet(outcome, cohort)


def _no_rollout_yet(outcome: Outcome, cohort: str) -> UnreachableError:
    """Asked was a rollout, and there is none: a script must not go on as if there were."""
    number = (outcome.proposal or {}).get("id")
    return UnreachableError(
        f"no rollout to {cohort} has begun",
        why=f"{outcome.version} is staged, and nothing is published before others have signed",
        then=f"have somebody else type: release approve {number}; then run the same command again",
        reason="not-approved",
    )


def _deltas() -> int:
    from release_server.publish import build as builder

    return builder.read_project(Path()).deltas if Path(PROJECT_FILE).exists() else builder.DELTAS


def releases_of(
    paths: Sequence[Path], version: str | None, gates: Sequence[str], notes: str, *, barrier: bool
) -> list[Release]:
    """The bundles of a call, read and checked; a directory stands for its one bundle, or is built."""
    from release_server.publish import build as builder
    from release_server.publish import push as pushing

    own_gates, stone = tuple(gates), 0
    if Path(PROJECT_FILE).exists():
        project = builder.read_project(Path())
        own_gates, stone = own_gates or project.gates, project.upgrade_from_seq
    loaded = []
    for path in paths:
        archive = path
        if path.is_dir():
            archive = builder.build(path, version, progress=_step).archive if version else _only_bundle(path)
        loaded.append(
            pushing.load(archive, gates=own_gates, upgrade_from_seq=stone, notes=notes, barrier=barrier)
        )
    return loaded


def _only_bundle(directory: Path) -> Path:
    found = sorted(directory.glob(f"*{ARCHIVE_SUFFIX}")) or sorted(
        (directory / DIST).glob(f"*{ARCHIVE_SUFFIX}")
    )
    if len(found) == 1:
        return found[0]
    if not found:
        raise NotFoundError(
            f"there is no bundle in {directory} nor in its {DIST}/", then="release build --version V"
        )
    raise UsageError(
        f"there are {len(found)} bundles to choose from",
        why=", ".join(path.name for path in found[-3:]),
        then="name the one to push",
    )


def _tell_push(outcome: Outcome, url: str, cohort: str | None) -> None:
    from release_server.publish.push import size

    words = {
        "published": f"published on {url}",
        "already": f"is published on {url} already, with these very bytes",
        "accepted": f"is with {url}, which has not published it yet; the same command goes on waiting",
        "staged": f"is with {url}, signed by one; nothing is published before others have signed",
        "dry-run": f"would be published on {url} as seq {outcome.seq}; nothing was changed",
    }
    console.say(f"{outcome.product} {outcome.version} {words[outcome.state]}")
    for version, platforms in outcome.left_behind.items():
        console.warn(
            f"{version} is a barrier without a bundle for {', '.join(platforms)}, "
            f"which earlier releases have: hosts there go no further until one is pushed as {version}"
        )
    if outcome.proposal is not None and outcome.state == "staged":
        tell_waiting(outcome.proposal)
    if outcome.rollout is not None:
        name = outcome.rollout.get("name") or f"r-{outcome.rollout.get('id')}"
        console.say(f"rollout {name} to {cohort}; watch it: release rollout status {name} --watch")

    def text() -> str:
        rows = [
            [entry["platform"], size(entry["length"]), outcome.seq, entry["sha256"]]
            for entry in outcome.bundles
        ]
        return console.table(["platform", "size", "seq", "sha256"], rows)

    console.emit(asdict(outcome), text)


# --- what is there -----------------------------------------------------------------------------------------


@click.command("list")
def list_releases() -> None:
    """List the releases of a product, the newest first, and above them those that wait for signatures."""
    found = profiles.current()
    client = connect(found)
    product = found.need_product()
    rows = [row | {"state": "published"} for row in client.items("/releases", product=product)]
    rows.sort(key=lambda row: -int(row.get("seq") or 0))
    rows = [*_waiting(client.items("/proposals"), product), *rows]

    def text() -> str:
        columns = ["version", "seq", "platforms", "published_at", "published_by"]
        shown = [
            [_platforms(row) if name == "platforms" else _cell(row, name) for name in columns] for row in rows
        ]
        return console.table(columns, shown, empty="no releases yet; release push makes the first")

    console.emit(rows, text)


def _waiting(proposals: list[dict[str, Any]], product: str) -> list[dict[str, Any]]:
    """A row for each version that a proposal adds; the server's word, and nothing is published yet."""
    rows = []
    for proposal in proposals:
        paths = [change["what"].split("/") for change in proposal["changes"] if change["kind"] == "added"]
        bundles = [path for path in paths if path[:2] == ["bundles", product] and len(path) == 4]
        for version in sorted({path[2] for path in bundles}):
            platforms = [path[3].removesuffix(ARCHIVE_SUFFIX) for path in bundles if path[2] == version]
            rows.append(
                {
                    "product": product,
                    "version": version,
                    "state": "staged",
                    "seq": None,
                    "published_at": None,
                    "published_by": None,
                    "bundles": [{"platform": platform} for platform in platforms],
                    "proposal": {key: proposal[key] for key in ("id", "created_by", "missing", "expires_at")},
                }
            )
    return rows


def _cell(row: dict[str, Any], name: str) -> Any:
    if name == "published_at" and row["state"] == "staged":
        missing, number = row["proposal"]["missing"], row["proposal"]["id"]
        return f"waits for {missing} more signature(s): release approve {number}"
    return row.get(name)


def _platforms(row: dict[str, Any]) -> str:
    return ", ".join(entry["platform"] for entry in row.get("bundles") or [])


@click.command("show")
@click.argument("version")
def show(version: str) -> None:
    """Show one release and its bundles."""
    found = profiles.current()
    path = f"/releases/{quote(found.need_product(), safe='')}/{quote(version, safe='')}"
    row = connect(found).get(path)

    def text() -> str:
        columns = ["platform", "length", "unpacked", "sha256"]
        facts = {**row, "reach": render.concerned(row["reach"])}
        plain = console.facts((name, value) for name, value in facts.items() if name != "bundles")
        bundles = [[entry.get(name) for name in columns] for entry in row.get("bundles") or []]
        return f"{plain}\n\n{console.table(columns, bundles, empty='no bundles')}"

    console.emit(row, text)
