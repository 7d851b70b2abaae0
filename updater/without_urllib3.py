"""Lets tuf be imported without urllib3, which a bundle does not hold and no agent loads.

`tuf.ngclient` imports its own HTTP client before anyone can say that another is used. Ours is
`updater.transport`; leaving urllib3 out makes the device's set of libraries smaller by the one that would
parse bytes from the network, and a check cheaper by a sixth.
"""

from __future__ import annotations

import sys
from types import ModuleType


class Urllib3Fetcher:
    """Stands where tuf looks for its default; a client without a fetcher of its own cannot be made."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError("an agent has no urllib3: give tuf a fetcher")


def stand_in() -> None:
    """Take the place of tuf's HTTP client, unless that is loaded already."""
    module = ModuleType("tuf.ngclient.urllib3_fetcher")
    module.Urllib3Fetcher = Urllib3Fetcher  # type: ignore[attr-defined]
    sys.modules.setdefault(module.__name__, module)


stand_in()
