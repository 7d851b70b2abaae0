"""The warehouse's scales. Broken on purpose: two seconds after its start the whole agent gives up on them.

This is the kind of fault that a test bench with scales never shows. The health checks see it in the trial,
and the host goes back to the version before by itself.
"""

from __future__ import annotations

import time
from typing import Any

PATIENCE_S = 2.0
_started_s = time.monotonic()


def sample(_settings: object) -> dict[str, Any]:
    if time.monotonic() - _started_s >= PATIENCE_S:
        raise SystemExit("no scale has answered")
    return {"answered": 0}
