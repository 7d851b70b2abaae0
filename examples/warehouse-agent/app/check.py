"""Health check: exit 0 when this version has written a sample in the last seconds, else 1 and say why.

It runs once a second, so it imports next to nothing: a sample begins with when it was taken and by which
version, and to read that takes no JSON library. Age is measured on the clock that counts from boot, which
nobody sets.
"""

from __future__ import annotations

import os
import sys
import time

FRESH_S = 3.0
TAIL = 65536


def last_line(path: str) -> str:
    """The last line that is whole: one without its end is still being written."""
    with open(path, "rb") as file:  # noqa: PTH123 - pathlib takes longer to load than all the rest
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        return file.read().rpartition(b"\n")[0].rpartition(b"\n")[2].decode()


def value(member: str, name: str) -> str:
    found, _, text = member.partition(":")
    if found != f'"{name}"':
        raise ValueError(f"{name} is not where it should be")
    return text.strip('"')


def fault(path: str, version: str) -> str:
    """Why the samples are not as they should be; empty when they are."""
    try:
        _at, boot, of, *_ = last_line(path).split(",", 3)
        taken_s, by = float(value(boot, "boot_s")), value(of, "version")
    except (OSError, ValueError) as error:
        return f"there is no sample yet: {error}"
    if by != version:
        return f"the last sample is of {by or 'no version'}, not of {version}"
    # Looked at after the sample was read: one written in between would seem to come from the future.
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - taken_s
    if not 0 <= age_s <= FRESH_S:  # below nought: of the boot before
        return f"the last sample is {age_s:.1f} s old"
    return ""


if __name__ == "__main__":
    samples = os.environ["RELFLEET_ROOT"] + "/app-data/samples.jsonl"
    why = fault(samples, os.environ.get("RELFLEET_VERSION", ""))
    print(why or "the last sample is fresh")
    sys.exit(1 if why else 0)
