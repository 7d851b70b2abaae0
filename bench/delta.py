#!/usr/bin/env python3
"""How long a delta is, beside its bundle, for two versions of the example product: python bench/delta.py"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from agent_core import bundle, delta
from release_server.publish.build import build

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "warehouse-agent"


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        place = Path(home)
        old, new = (build(EXAMPLE, version, out=place / version) for version in ("1.0.0", "1.1.0"))
        for built in (old, new):
            bundle.unpack(built.archive, built.index, place / f"tree-{built.index.version}")
        trees = [place / f"tree-{built.index.version}" for built in (old, new)]
        began_s = time.process_time()
        length = delta.make(trees[0], old.index, trees[1], new.index, place / "delta")
        made_s = time.process_time()
        delta.apply(place / "delta", trees[0], old.index, new.index, place / "applied")
        applied_s = time.process_time()
        known = {file.sha256 for file in old.index.files}
        changed = sum(file.sha256 not in known for file in new.index.files)
        print(f"bundle   {new.length:>9} bytes, {len(new.index.files)} files")
        print(f"delta    {length:>9} bytes, {changed} files changed: {length / new.length:.2%} of the bundle")
        print(f"made in {made_s - began_s:.2f} s, applied in {applied_s - made_s:.2f} s of processor time")


if __name__ == "__main__":
    main()
