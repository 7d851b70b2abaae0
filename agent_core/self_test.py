"""This module lets a new launcher prove itself: on a copy of a root it says what it would start, no more.

`agent upgrade-launcher` runs it before it puts the new file in the place of the old one. It travels in that
file, so it needs the standard library, the launcher and the slots only, Python 3.9 or newer.
"""

from __future__ import annotations

import json

from agent_core import launcher, slots


def tell(root: str) -> int:
    """Print the launcher's number, the record as it reads it, and its decision, as one line of JSON."""
    record = slots.recover(root)
    plan = launcher.decide(record, slots.complete(root, record))
    told = {"launcher": launcher.LAUNCHER, "record": record, "plan": plan}
    print(json.dumps(told, default=vars, sort_keys=True), flush=True)
    return 0
