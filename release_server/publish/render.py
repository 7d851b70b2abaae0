"""What operators read: how long, how long ago, how much, and the views of agents, cohorts and rollouts.

Everything here is pure but `RolloutView`, which draws on a terminal. Times arrive as the API writes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from agent_core import console
from agent_core.clock import parse_iso

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from rich.console import Console, RenderableType
    from rich.live import Live

UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
FULL_BP = 10_000
WIDTH = 100
GAP = "        "

COUNTERS = (
    "offered",
    "downloading",
    "staged",
    "trial",
    "healthy",
    "rolled_back",
    "failed",
    "silent",
    "skipped",
)
"""How the counters of a rollout are ordered everywhere: the way of an attempt, then its ends."""
BAD = frozenset({"rolled_back", "failed", "silent"})


# --- durations, times, shares ----------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A duration in its two largest units, `2 h 5 min`; below a second it is `0 s`."""
    left = max(0, int(seconds))
    for place, (unit, size) in enumerate(UNITS):
        if left >= size:
            text = f"{left // size} {unit}"
            if place + 1 < len(UNITS) and (rest := left % size // UNITS[place + 1][1]):
                text += f" {rest} {UNITS[place + 1][0]}"
            return text
    return "0 s"


def ago(moment: str | None, now: datetime) -> str:
    """How long ago a time of the API was: `42 s ago`, `just now`, `in 3 min`, or `never` for none.

    A clock that differs by a second or two from the server's does not make a report come from the future.
    """
    if not moment:
        return "never"
    seconds = (now - parse_iso(moment)).total_seconds()
    if -3 < seconds < 1:
        return "just now"
    return f"in {duration(-seconds)}" if seconds < 0 else f"{duration(seconds)} ago"


def percent(basis_points: int) -> str:
    """`1250` as `12.5%`; never more digits than basis points have."""
    return f"{basis_points / 100:.2f}".rstrip("0").rstrip(".") + "%"


def size_of(stage: Mapping[str, Any]) -> str:
    """How far a stage reaches: `10%`, or `5 agents`."""
    if stage.get("share_bp") is not None:
        return percent(int(stage["share_bp"]))
    return agents(int(stage.get("count") or 0))


def limit_of(stage: Mapping[str, Any]) -> str:
    """What a stage allows to fail: `1%`, or `2 agents`."""
    if stage.get("max_failed_bp") is not None:
        return percent(int(stage["max_failed_bp"]))
    return agents(int(stage.get("max_failed") or 0))


def agents(count: int) -> str:
    return "1 agent" if count == 1 else f"{count} agents"


def concerned(found: Mapping[str, Any]) -> str:
    """Who has to do with a release: `3 agents, cohort main, rollout r-2`."""
    cohorts = [f"cohort {name}" for name in found["cohorts"]]
    rollouts = [f"rollout {name}" for name in found["rollouts"]]
    return ", ".join([agents(int(found["agents"])), *cohorts, *rollouts])


def labels(pairs: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(pairs.items()))


def every_label(agent: Mapping[str, Any]) -> dict[str, str]:
    """The labels that count: the agent's own, overridden by the operators'."""
    return {**(agent.get("labels") or {}), **(agent.get("operator_labels") or {})}


# --- agents ----------------------------------------------------------------------------------------------


def agent_table(found: Iterable[Mapping[str, Any]], now: datetime) -> str:
    rows = [
        [
            agent["id"],
            agent.get("version") or "-",
            agent.get("cohort") or "-",
            agent.get("state"),
            agent.get("phase"),
            ago(agent.get("seen_at"), now),
            labels(every_label(agent)),
        ]
        for agent in found
    ]
    return console.table(
        ["agent", "version", "cohort", "state", "phase", "seen", "labels"], rows, empty="no agents match"
    )


def agent_view(agent: Mapping[str, Any], now: datetime) -> str:
    """All of one agent, with what it did lately."""
    last = " · ".join(part for part in (agent.get("reason"), agent.get("detail")) if part)
    text = console.facts(
        [
            ("agent", agent["id"]),
            ("product", agent.get("product")),
            ("version", agent.get("version") or "none yet"),
            (
                "cohort",
                f"{agent.get('cohort') or 'none'}{' (moved here)' if agent.get('cohort_fixed') else ''}",
            ),
            ("state", _state(agent)),
            ("phase", agent.get("phase")),
            ("last decision", last or "none reported"),
            ("platform", agent.get("platform")),
            ("gate", agent.get("gate") or "any"),
            ("labels", labels(every_label(agent)) or "none"),
            ("seen", ago(agent.get("seen_at"), now)),
            ("enrolled", ago(agent.get("enrolled_at"), now)),
        ]
    )
    if agent.get("retired_at"):
        text += f"\nretired        {ago(agent['retired_at'], now)}"
    known = agent.get("facts") or {}
    origins = [[name, fact.get("value"), fact.get("origin")] for name, fact in known.items()]
    if origins:
        text += f"\n\n{console.table(['fact', 'value', 'says'], origins)}"
    events = [
        [event.get("at"), event.get("version"), event.get("state"), event.get("reason"), event.get("detail")]
        for event in agent.get("events") or []
    ]
    return (
        f"{text}\n\n{console.table(['at', 'version', 'state', 'reason', 'detail'], events)}"
        if events
        else text
    )


def _state(agent: Mapping[str, Any]) -> str:
    """Its one word, and that it is held where something weightier hides it."""
    state = str(agent.get("state"))
    return f"{state}, held on the host" if agent.get("held") and state != "held" else state


def why(answer: Mapping[str, Any], width: int = WIDTH) -> str:
    """The explanation of one agent or rollout: a summary, what holds, then what does not with its way out.

    Args:
        answer: `GET /agents/{id}/why`: summary and chain of {ok, code, text, then?}; that of a rollout says
            also what comes next.
        width: where a line of things that hold is broken.
    """
    chain = answer.get("chain") or []
    lines = [str(answer.get("summary") or answer.get("agent") or "")]
    lines += side_by_side([f"ok  {row['text']}" for row in chain if row["ok"]], width)
    for row in chain:
        if not row["ok"]:
            lines.append(f"  no  {row['text']}")
            lines += [f"      {line}" for line in str(row.get("then") or "").splitlines()]
    if answer.get("next"):
        lines.append(f"  next  {answer['next']['text']}")
    return "\n".join(lines)


def side_by_side(texts: Iterable[str], width: int) -> list[str]:
    lines: list[str] = []
    for text in texts:
        if lines and len(lines[-1]) + len(GAP) + len(text) <= width:
            lines[-1] += GAP + text
        else:
            lines.append("  " + text)
    return lines


# --- cohorts ---------------------------------------------------------------------------------------------


def standing(cohort: Mapping[str, Any]) -> str:
    """What holds a cohort, if anything: `pinned to 1.4.2`, `frozen until …`, or `follows`."""
    if cohort.get("frozen"):
        until = f" until {cohort['frozen_until']}" if cohort.get("frozen_until") else ""
        by = f" ({cohort['frozen_by']})" if cohort.get("frozen_by") else ""
        return f"frozen{until}{by}"
    return f"pinned to {cohort['pin']}" if cohort.get("pin") else "follows"


def because(cohort: Mapping[str, Any]) -> str:
    """Why a cohort stands as it does: who froze or pinned it, and what for; empty when nobody did."""
    acts = {"frozen": cohort.get("freeze"), "pinned": cohort.get("pinned")}
    return "; ".join(f"{verb} {said_by(act, act['at'])}" for verb, act in acts.items() if act and "at" in act)


def said_by(act: Mapping[str, Any], at: str) -> str:
    """When somebody did something, who, and what for."""
    by = f"{at} by {act['actor']}" if act.get("actor") else at
    return f"{by}: {act['reason']}" if act.get("reason") else by


def cohort_table(found: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        [
            cohort["name"],
            cohort.get("match") or "(every agent)",
            cohort.get("priority"),
            reach(cohort),
            cohort.get("base") or "-",
            standing(cohort),
        ]
        for cohort in found
    ]
    return console.table(
        ["cohort", "match", "priority", "agents", "base", "standing"], rows, empty="no cohorts yet"
    )


def window(said: Mapping[str, Any] | None) -> str:
    """When updates may begin, as `--window` takes it."""
    if not said:
        return "always"
    return f"{','.join(said['days'])} {said['from']}-{said['to']} {said['zone']}"


def calendar(said: Mapping[str, str] | None) -> str:
    """What freezes a cohort by the calendar, as `--calendar` takes it."""
    return "; ".join(f"{name}={entry}" for name, entry in (said or {}).items()) or "none"


def lease(said: Mapping[str, Any] | None) -> str:
    """How many of a failure domain may be between two versions, as `--lease` takes it."""
    if not said:
        return "none"
    count, share = said.get("limit"), said.get("share_bp")
    sizes = [None if count is None else str(count), None if share is None else percent(share)]
    return f"{said['scope']}={','.join(filter(None, sizes))}"


def budget(said: Mapping[str, Any] | None) -> str:
    """`2000 kB/s into each site, for 4 agents at once`."""
    if not said:
        return "none"
    whole, at_once = f"{said['bytes_per_s'] / 1000:g} kB/s into each {said['scope']}", said["at_once"]
    return f"{whole}, for {at_once} agents at once" if at_once > 1 else f"{whole}, for one agent at a time"


def cohort_view(cohort: Mapping[str, Any]) -> str:
    return console.facts(
        [
            ("cohort", cohort["name"]),
            ("product", cohort.get("product")),
            ("match", cohort.get("match") or "(every agent)"),
            ("priority", cohort.get("priority")),
            ("agents", reach(cohort)),
            ("base", cohort.get("base") or "none yet"),
            ("standing", standing(cohort)),
            ("why", because(cohort) or "-"),
            ("window", window(cohort.get("window"))),
            ("calendar", calendar(cohort.get("calendar"))),
            ("polls", f"every {duration(cohort.get('poll_s') or 0)}"),
            ("reports", f"every {duration(cohort.get('report_s') or 0)}"),
            ("splay", duration(cohort.get("splay_s") or 0)),
            ("lease", lease(cohort.get("lease"))),
            ("budget", budget(cohort.get("budget"))),
            ("revision", cohort.get("revision")),
            ("changed", said_by(cohort, str(cohort.get("changed_at") or ""))),
        ]
    )


def preview(answer: Mapping[str, Any]) -> str:
    """Whom a match would reach and how they stand: `+` joins, `-` leaves, the others stay."""
    inside, joins, leaves = (list(answer.get(key) or []) for key in ("agents", "joins", "leaves"))
    counts = {"agents": len(inside), "joins": len(joins), "leaves": len(leaves)}
    counts |= answer.get("counts") or {}
    match = repr(answer["match"]) if answer.get("match") else "everything"
    head = f"{agents(counts['agents'])} would match {match}"
    new = set(joins)
    lines = [f"{'+' if name in new else ' '} {name}" for name in inside] + [f"- {name}" for name in leaves]
    if left := counts["agents"] - len(inside) + counts["leaves"] - len(leaves):
        lines.append(f"  and {left} more")
    moves = f"{counts['joins']} join, {counts['leaves']} leave"
    return "\n".join([f"{head}: {moves}", *_standing(counts, answer.get("version")), *lines])


def _standing(counts: Mapping[str, int], version: str | None) -> list[str]:
    """`212 agents: 198 ready, 14 held, 3 without a bundle`, where the server says it."""
    if "ready" not in counts:
        return []
    bundle = f"without a bundle of {version}" if version else "without a bundle"
    words = {"ready": "ready", "held": "held", "silent": "silent", "no_bundle": bundle}
    said = [f"{counts[key]} {word}" for key, word in words.items() if counts.get(key) or key == "ready"]
    return [f"{agents(counts['agents'])}: {', '.join(said)}"]


def reach(cohort: Mapping[str, Any]) -> int:
    """How many agents a cohort has, whichever way the answer says it."""
    count = cohort.get("agents", cohort.get("members", 0))
    return len(count) if isinstance(count, list) else int(count or 0)


# --- rollouts --------------------------------------------------------------------------------------------


def name_of(rollout: Mapping[str, Any]) -> str:
    return str(rollout.get("name") or f"r-{rollout['id']}")


def travel(rollout: Mapping[str, Any]) -> str:
    return f"{rollout.get('base') or 'nothing'} → {rollout['version']}"


def plan(rollout: Mapping[str, Any]) -> str:
    """The stages as a chain, `1% → 10% → 100%`."""
    return " → ".join(size_of(stage) for stage in rollout.get("stages") or [])


def counted(rollout: Mapping[str, Any]) -> dict[str, int]:
    """The counters that are not zero, in the order of an attempt's way."""
    counters = rollout.get("counters") or {}
    return {name: int(counters[name]) for name in COUNTERS if counters.get(name)}


def tally(rollout: Mapping[str, Any]) -> str:
    """`3/20 healthy, 1 failed`: the healthy of all, then whatever else is not zero."""
    counts = counted(rollout)
    parts = [f"{counts.pop('healthy', 0)}/{rollout.get('members') or 0} healthy"]
    return ", ".join([*parts, *(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())])


def condition(rollout: Mapping[str, Any]) -> str:
    """State with its reason: `running`, `paused (max-failed: 1 of 1 failed)`."""
    state = str(rollout["state"]).replace("_", " ")
    because = ": ".join(str(part) for part in (rollout.get("reason"), rollout.get("detail")) if part)
    return f"{state} ({because})" if because else state


def at_stage(rollout: Mapping[str, Any]) -> str:
    """`stage 2/4 (10%) soaking`, or nothing when there is no stage to be in."""
    stages = rollout.get("stages") or []
    place = int(rollout.get("stage") or 0)
    if not 0 <= place < len(stages):
        return ""
    return f"stage {place + 1}/{len(stages)} ({size_of(stages[place])}) {rollout.get('stage_state')}"


def rollout_line(rollout: Mapping[str, Any]) -> str:
    """One rollout in one line; what a watch prints for each change when nobody looks at a terminal."""
    parts = [name_of(rollout), travel(rollout), condition(rollout), at_stage(rollout), tally(rollout)]
    return "  ".join(part for part in parts if part)


def rollout_table(found: Iterable[Mapping[str, Any]], now: datetime) -> str:
    rows = [
        [
            name_of(rollout),
            rollout.get("cohort"),
            travel(rollout),
            condition(rollout),
            at_stage(rollout),
            tally(rollout),
            ago(rollout.get("created_at"), now),
        ]
        for rollout in found
    ]
    return console.table(
        ["rollout", "cohort", "release", "state", "stage", "agents", "started"], rows, empty="no rollouts yet"
    )


def stage_state(rollout: Mapping[str, Any], place: int) -> str:
    """The state of one stage; the rollout itself only says the one it is in."""
    current = int(rollout.get("stage") or 0)
    if place < current or rollout["state"] == "completed":
        return "passed"
    return str(rollout.get("stage_state") or "pending") if place == current else "pending"


def rollout_view(rollout: Mapping[str, Any], now: datetime) -> str:
    """All of one rollout but its history; whoever approves it sees here what the digest is of."""
    begun = "asked" if rollout.get("stage_state") == "pending" else "started"
    pairs = [
        ("rollout", name_of(rollout)),
        ("cohort", f"{rollout.get('cohort')} ({agents(int(rollout.get('members') or 0))})"),
        ("release", travel(rollout)),
        ("state", condition(rollout)),
        ("progress", percent(int(rollout.get("progress") or 0))),
        ("agents", tally(rollout)),
        (begun, f"{ago(rollout.get('created_at'), now)} by {rollout.get('created_by') or 'unknown'}"),
    ]
    if rollout.get("finished_at"):
        pairs.append(("finished", ago(rollout["finished_at"], now)))
    if rollout.get("watch_until"):
        pairs.append(("watched", f"until {rollout['watch_until']}"))
    text = console.facts([*pairs, *agreed(rollout)])
    stages = list(rollout.get("stages") or [])
    rows = [
        [
            place + 1,
            size_of(stage),
            stage_state(rollout, place),
            duration(stage.get("soak_s") or 0),
            limit_of(stage),
            stage.get("min_sample"),
            duration(stage["deadline_s"]) if stage.get("deadline_s") else "none",
        ]
        for place, stage in enumerate(stages)
    ]
    heads = ["stage", "reach", "state", "soak", "may fail", "min sample", "deadline"]
    if any(stage.get("max_silent") is not None for stage in stages):
        heads.append("may be silent")
        rows = [[*row, _silent(stage)] for row, stage in zip(rows, stages, strict=True)]
    return f"{text}\n\n{console.table(heads, rows, empty='no stages')}"


def _silent(stage: Mapping[str, Any]) -> str:
    most = stage.get("max_silent")
    return "-" if most is None else agents(int(most))


def agreed(rollout: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of the terms of a rollout those that are not as usual, and the digest where one is approved."""
    terms = rollout.get("terms") or {}
    pairs = [("begins", f"not before {terms['not_before']}")] if terms.get("not_before") else []
    said = [word for key, word in TERMS.items() if terms.get(key)]
    if terms.get("figures") is False or terms.get("false_halt_bp") == 0:
        said.append("nothing is compared with before")
    if (watch_s := terms.get("watch_s", WATCH_S)) != WATCH_S:
        said.append(f"watched for {duration(watch_s)} afterwards" if watch_s else "not watched afterwards")
    pairs += [("terms", "; ".join(said))] if said else []
    return [*pairs, ("plan", str(rollout["digest"]))] if terms.get("approval") else pairs


TERMS = {
    "downgrade": "a downgrade, on purpose",
    "stratified": "first an agent of each site and platform",
    "approval": "a second person approves",
}
WATCH_S = 3_600


def rehearsal_view(rehearsed: Mapping[str, Any]) -> str:
    """What a rollout would do."""
    rows = [
        [
            place + 1,
            percent(int(stage["progress"])),
            agents(int(stage["agents"])),
            stage["opens_at"],
            ", ".join(stage["names"]) + (", …" if stage["agents"] > len(stage["names"]) else ""),
        ]
        for place, stage in enumerate(rehearsed["stages"])
    ]
    table = console.table(["stage", "progress", "reach", "opens", "for instance"], rows, empty="no agents")
    done = f"done at {rehearsed['done_at']} at the earliest" if rehearsed.get("done_at") else "never done"
    return f"{travel(rehearsed)}, {agents(int(rehearsed['agents']))}, {done}\n\n{table}"


def event_table(events: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        [
            event.get("at"),
            event.get("event"),
            int(event.get("stage") or 0) + 1,
            event.get("reason"),
            event.get("detail"),
            event.get("actor") or "server",
        ]
        for event in events
    ]
    return console.table(
        ["at", "event", "stage", "reason", "detail", "by"], rows, empty="nothing happened yet"
    )


class RolloutView:
    """Shows a rollout as it moves: a picture redrawn in place on a terminal, a line a change elsewhere.

    Args:
        terminal: draw on this console; None prints lines with `write`.
        write: takes one line; used without a terminal.
    """

    def __init__(self, terminal: Console | None, write: Any = print) -> None:
        self.terminal = terminal
        self.write = write
        self.live: Live | None = None
        self.last = ""

    def __enter__(self) -> Self:
        if self.terminal is not None:
            from rich.live import Live

            self.live = Live(console=self.terminal, refresh_per_second=8)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, rollout: Mapping[str, Any], note: str = "") -> None:
        """Show the rollout as it is now; without a terminal only what differs from the last time."""
        if self.live is not None:
            self.live.update(picture(rollout, note))
            return
        line = rollout_line(rollout) + (f"  ({note})" if note else "")
        if line != self.last:
            self.last = line
            self.write(line)


def picture(rollout: Mapping[str, Any], note: str = "") -> RenderableType:
    """The rollout for a terminal: a bar for each stage, then the counters."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for place, stage in enumerate(rollout.get("stages") or []):
        state = stage_state(rollout, place)
        grid.add_row(
            Text(f" {place + 1}", style="dim"),
            Text(size_of(stage), justify="right"),
            ProgressBar(total=1.0, completed=filled(rollout, place), width=40),
            Text(state, style=style_of(state)),
        )
    heading = Text.assemble((name_of(rollout), "bold"), f"  {travel(rollout)}  ")
    heading.append(condition(rollout), style=style_of(str(rollout["state"])))
    counts = Text("  ").join(
        Text(f"{count} {name.replace('_', ' ')}", style="red" if name in BAD else "")
        for name, count in counted(rollout).items()
        if name != "healthy"
    )
    lines: list[RenderableType] = [heading, grid, Text(f" {tally(rollout).split(',')[0]}   ") + counts]
    if note:
        lines.append(Text(f" {note}", style="yellow"))
    return Group(*lines)


def style_of(state: str) -> str:
    """The colour of a state of a rollout or of a stage."""
    if state in {"completed", "passed"}:
        return "green"
    if state in {"aborted", "rolled_back", "halted", "rolling_back"}:
        return "red"
    return "yellow" if state in {"paused", "soaking", "superseded"} else ""


def filled(rollout: Mapping[str, Any], place: int) -> float:
    """How much of a stage's bar is filled: its healthy agents of those it reaches."""
    if stage_state(rollout, place) == "passed":
        return 1.0
    if place > int(rollout.get("stage") or 0):
        return 0.0
    return min(1.0, counted(rollout).get("healthy", 0) / target(rollout, place))


def target(rollout: Mapping[str, Any], place: int) -> int:
    """How many agents a stage reaches, at least one."""
    stage = rollout["stages"][place]
    members = int(rollout.get("members") or 0)
    if stage.get("share_bp") is not None:
        return max(1, -(-members * int(stage["share_bp"]) // FULL_BP))
    return max(1, min(members, int(stage.get("count") or 0)))
