"""What release managers sign besides releases: policies, and the same targets anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from agent_core import clock, console
from agent_core.errors import NotFoundError
from keys.cli import keys_dir_option, passphrase_option, passphrases
from release_server.publish import profile as profiles
from release_server.publish.commands.operate import reason_option
from release_server.publish.profile import connect, trust_option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from agent_core.wire import Policy
    from keys.changes import Change
    from release_server.publish.client import Client
    from release_server.publish.propose import Manager, Sent
    from release_server.publish.sign import Trusted


def signing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that signs with release keys."""
    for option in (passphrase_option(), keys_dir_option(), trust_option()):
        command = option(command)
    return command


def manager(keys_dir: Path | None, trust: Path | None, passphrase_file: Path | None = None) -> Manager:
    """The release manager of the running command."""
    from release_server.publish import propose, sign

    found = profiles.current(keys_dir=keys_dir, trust=trust)

    def opened(trusted: Trusted) -> Sequence[Any]:
        return sign.release_signers(found.keys_dir, trusted.root.signed, passphrases(passphrase_file))

    return propose.Manager(connect(found), sign.read_trust(found.trust), found.state, opened)


def wait_s() -> float:
    from release_server.publish import propose

    return console.options().timeout_s or propose.PUBLISH_S


def tell_sent(sent: Sent, url: str, what: str) -> None:
    """Say what became of something that was signed."""
    words = {
        "published": f"published on {url} as targets {sent.version}",
        "accepted": f"with {url}, which has not published it yet; it will by itself",
        "staged": f"with {url} as targets {sent.version}; nothing is published before others have signed",
    }
    console.say(f"{what}: {words[sent.state]}, good until {sent.expires}")
    if sent.proposal and sent.state == "staged":
        tell_waiting(sent.proposal)


def tell_waiting(proposal: dict[str, Any]) -> None:
    """Say what a proposal waits for, and what to type there."""
    number, missing = proposal["id"], proposal["missing"]
    console.say(
        f"proposal {number} waits for {missing} more signature(s) until {proposal['expires_at']}; "
        f"on another release manager's machine: release approve {number}"
    )


# --- policies ----------------------------------------------------------------------------------------------


@click.group("policy", cls=console.Group, short_help="Say which releases must never be installed.")
def policy() -> None:
    """A product's floor and revoked releases, signed with the release keys.

    No server can undo them: agents refuse what they forbid, whatever they are told.
    """


@policy.command("show", short_help="Show the floor and what is revoked.")
@signing_options
def show_policy(keys_dir: Path | None, trust: Path | None, passphrase_file: Path | None) -> None:
    """Show a product's policy as this release manager's own client has verified it."""
    from keys import changes
    from release_server.publish import policy as rules

    product = profiles.current().need_product()
    targets = manager(keys_dir, trust, passphrase_file).look().targets.signed
    held = changes.policy_of(targets.targets, product)
    versions = changes.versions_by_seq(targets.targets, product)
    forbidden = rules.forbidden(targets.targets, product, held)
    shown = {
        "product": product,
        "floor": {"seq": held.floor_seq, "version": versions.get(held.floor_seq)} if held.floor_seq else None,
        "revoked": [{"seq": seq, "version": versions.get(seq)} for seq in held.revoked_seq],
        "forbidden": forbidden,
        "targets_version": targets.version,
        "targets_expire": clock.iso(targets.expires),
    }

    def text() -> str:
        return console.facts(
            [
                ("product", product),
                ("policy", changes.describe_policy(held, versions)),
                ("forbids", ", ".join(forbidden) or "nothing that was published"),
                ("targets", f"version {targets.version}, good until {shown['targets_expire']}"),
            ]
        )

    console.emit(shown, text)


@policy.command("set", short_help="Raise the floor.")
@click.option("--floor", metavar="VERSION", required=True, help="The oldest version that may be installed.")
@signing_options
def set_policy(floor: str, keys_dir: Path | None, trust: Path | None, passphrase_file: Path | None) -> None:
    """Raise the floor: whatever is older than VERSION is never installed again. A floor never falls."""
    from release_server.publish import policy as rules

    def raised(held: Policy, files: Any, product: str) -> Policy:
        return rules.with_floor(held, rules.seq_of(files, product, floor), floor)

    _change(manager(keys_dir, trust, passphrase_file), raised, f"the floor is {floor}")


@policy.command("revoke", short_help="Forbid one version for good.")
@click.argument("version", nargs=-1, required=True)
@click.option("--undo", is_flag=True, help="Take a revocation back; agents do not remember those.")
@signing_options
def revoke(
    version: tuple[str, ...],
    keys_dir: Path | None,
    trust: Path | None,
    passphrase_file: Path | None,
    *,
    undo: bool,
) -> None:
    """Forbid each VERSION, whatever the floor: no agent installs it any more.

    Agents that run it go on running it until they are given another version; what to type for that is said.
    """
    from release_server.publish import policy as rules

    def changed(held: Policy, files: Any, product: str) -> Policy:
        seqs = [rules.seq_of(files, product, each) for each in version]
        return rules.without_revoked(held, seqs) if undo else rules.with_revoked(held, seqs)

    names = ", ".join(version)
    words = f"{names} is no longer revoked" if undo else f"{names} revoked"
    _change(manager(keys_dir, trust, passphrase_file), changed, words)


def _change(who: Manager, change: Callable[[Policy, Any, str], Policy], words: str) -> None:
    """Sign another policy; what it newly forbids is named first, with how many agents run that."""
    from keys import changes
    from release_server.publish import policy as rules
    from release_server.publish import propose, sign

    product = profiles.current().need_product()
    trusted = who.look()
    files = trusted.targets.signed.targets
    held = changes.policy_of(files, product)
    wanted = change(held, files, product)
    if wanted == held:
        console.say(f"{product}: {words} already")
        console.emit({"state": "already", "policy": held.to_json(), "reach": []}, "already")
        return
    fresh = rules.newly_forbidden(files, product, held, wanted)
    reached = _reach(who.client, product, fresh)
    following = sign.with_policy(trusted, product, wanted, clock.now())
    _warn_of_barriers(rules.released_barriers(files, following.signed.targets, product))
    _confirm_policy(fresh, reached)
    sent = propose.send(who, trusted, following, wait_s=wait_s())
    tell_sent(sent, who.client.url, f"{product}: {words}")
    for line in _advice(reached):
        console.say(line)
    console.emit({**sent.to_json(), "policy": wanted.to_json(), "reach": reached}, sent.state)


def _warn_of_barriers(versions: Sequence[str]) -> None:
    """Say what becomes of hosts before a barrier that they may not install any more."""
    for version in versions:
        console.warn(
            f"{version} is a barrier, and hosts that have not run it stay where they are: "
            "they may not install it any more, and what was signed after it does not install over theirs. "
            "Have every host past it first (release agents list), or push a new version then, "
            f"which {version} does not bind"
        )


def _confirm_policy(fresh: Sequence[str], reached: Iterable[dict[str, Any]]) -> None:
    if fresh:
        agents = sum(entry["agents"] for entry in reached)
        console.confirm(
            f"No agent will install {', '.join(fresh)} any more. "
            f"{agents} agent(s) run that now, and go on until they are given another version."
        )


def _reach(client: Client, product: str, versions: Iterable[str]) -> list[dict[str, Any]]:
    """Who has to do with these versions now, as the server sees it."""
    found = []
    for version in versions:
        try:
            answer = client.get(f"/releases/{quote(product, safe='')}/{quote(version, safe='')}")
        except NotFoundError:  # signed, and not with the server yet
            continue
        found.append({"version": version, **answer["reach"]})
    return found


def _advice(reached: Iterable[dict[str, Any]]) -> list[str]:
    """What to type for those that still have to do with a forbidden version."""
    lines = []
    for entry in reached:
        version = entry["version"]
        if entry["agents"]:
            lines.append(f"{entry['agents']} agent(s) run {version}: release agents list --version {version}")
        lines += [
            f"cohort {name} has {version} as its base, and new hosts there will refuse it: "
            f"release rollout start NEWER --cohort {name}"
            for name in entry["cohorts"]
        ]
        lines += [f"{name} takes {version} along: release rollout abort {name}" for name in entry["rollouts"]]
    return lines


# --- the same anew -----------------------------------------------------------------------------------------


@click.command("renew", short_help="Sign the targets anew, without a new release.")
@signing_options
def renew(keys_dir: Path | None, trust: Path | None, passphrase_file: Path | None) -> None:
    """Sign the same targets anew, so that they hold for another 60 days. Nothing else changes.

    Needed only where nothing is pushed for weeks: every push and every policy does it as well.
    """
    from release_server.publish import propose, sign

    who = manager(keys_dir, trust, passphrase_file)
    trusted = who.look()
    before = clock.iso(trusted.targets.signed.expires)
    sent = propose.send(who, trusted, sign.next_targets(trusted, clock.now()), wait_s=wait_s())
    tell_sent(sent, who.client.url, f"the targets, which held until {before}")
    console.emit({**sent.to_json(), "held_until": before}, sent.state)


# --- two people --------------------------------------------------------------------------------------------


@click.command("approve", short_help="Verify what somebody else proposes, and sign it.")
@click.argument("number", type=click.IntRange(1), metavar="[ID]", required=False)
@click.option("--list", "listing", is_flag=True, help="List what waits for signatures, and sign nothing.")
@click.option("--all", "everything", is_flag=True, help="With --list: also what is published or withdrawn.")
@click.option("--dry-run", is_flag=True, help="Fetch and verify everything, show it, and sign nothing.")
@signing_options
def approve(
    number: int | None,
    *,
    listing: bool,
    everything: bool,
    dry_run: bool,
    keys_dir: Path | None,
    trust: Path | None,
    passphrase_file: Path | None,
) -> None:
    """Fetch the proposal ID, verify all of it, show what it changes, and sign it when you say so.

    Without ID it is the only one that waits. This machine believes nobody: it has its own trusted root and
    its own memory, reads every new bundle as a device would, and sends a signature and nothing else. With the
    last signature that is needed the server publishes.
    """
    from release_server.publish import approve as approving

    if listing:
        _list_proposals(everything=everything)
        return
    who = manager(keys_dir, trust)
    seen = approving.review(
        who,
        approving.choose(who.client, number),
        lambda name: console.say(f"fetching and reading the bundle of {name}"),
    )
    console.say(changes_table(seen.changes))
    found = {"proposal": seen.number, "changes": [change.to_json() for change in seen.changes]}
    if dry_run:
        console.say(f"proposal {seen.number} holds every rule; nothing was signed")
        console.emit({**found, "state": "dry-run", "missing": seen.missing}, "dry-run")
        return
    directory = profiles.current(keys_dir=keys_dir).keys_dir
    opened = approving.open_keys(directory, seen, passphrases(passphrase_file))
    console.confirm(f"This signs proposal {seen.number}: targets {seen.metadata.signed.version}, as above.")
    sent = approving.approve(who, seen, opened, wait_s())
    tell_sent(sent, who.client.url, f"proposal {seen.number}")
    console.emit({**sent.to_json(), **found}, sent.state)


def changes_table(found: Iterable[Change]) -> str:
    """What a proposal changes, a line each."""
    rows = [[change.kind, change.what, change.before or "-", change.after or "-"] for change in found]
    return console.table(["", "what", "before", "after"], rows)


def _list_proposals(*, everything: bool) -> None:
    found = connect(profiles.current()).items("/proposals", state="all" if everything else None)

    def text() -> str:
        rows = [
            [
                entry["id"],
                entry["state"],
                entry["created_by"],
                entry["created_at"],
                entry["expires_at"],
                ", ".join(signer["by"] for signer in entry["signers"]),
                entry["missing"],
                "; ".join(f"{change['kind']} {change['what']}" for change in entry["changes"]),
            ]
            for entry in found
        ]
        heads = ["id", "state", "by", "since", "until", "signed by", "missing", "changes"]
        return console.table(heads, rows, empty="nothing waits for a signature")

    console.emit(found, text)


@click.command("withdraw", short_help="Take back what waits for signatures.")
@click.argument("number", type=click.IntRange(1), metavar="ID")
@reason_option(required=True)
def withdraw(number: int, reason: str) -> None:
    """Take the proposal ID back, whoever made it: it can no longer be signed."""
    console.confirm(f"Proposal {number} can then no longer be signed.")
    answer = connect(profiles.current()).post(f"/proposals/{number}/withdraw", {"reason": reason})
    console.say(f"proposal {number} is withdrawn; to propose it again, run the same command as before")
    console.emit(answer, "withdrawn")


# --- the server's word -------------------------------------------------------------------------------------


@click.command("yank", short_help="Stop offering a release.")
@click.argument("version")
@click.option("--undo", is_flag=True, help="Offer it again; what was paused waits to be resumed.")
@reason_option(required=True)
def yank(version: str, reason: str, *, undo: bool) -> None:
    """Have the server stop offering VERSION: rollouts of it pause, and no cohort is given it anew.

    It needs no key and binds the server alone. To have every agent refuse it: release policy revoke.
    """
    found = profiles.current()
    client, product = connect(found), found.need_product()
    place = f"/releases/{quote(product, safe='')}/{quote(version, safe='')}"
    if not undo:
        reach = client.get(place)["reach"]
        console.confirm(
            f"Yanking {version} pauses {', '.join(reach['rollouts']) or 'no rollout'}; "
            f"{reach['agents']} agent(s) run it and keep it."
        )
    answer = client.post(f"{place}/{'unyank' if undo else 'yank'}", {"reason": reason})
    console.say(f"{product} {version} {'is offered again' if undo else 'is no longer offered'}")
    for line in [] if undo else _advice_yanked(version, answer["reach"]):
        console.say(line)
    console.emit(answer, "offered" if undo else "yanked")


def _advice_yanked(version: str, reach: dict[str, Any]) -> list[str]:
    return [
        f"cohort {name} keeps {version} as its base, for new hosts too: "
        f"release rollout start OTHER --cohort {name}"
        for name in reach["cohorts"]
    ]
