"""This module makes small file systems in memory, mounts them, and takes their power away.

A worker that mounts has a mount namespace of its own, and its loop devices free themselves: however it ends,
nothing stays mounted.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# ext4 needs a journal, so 16 MiB at least; xfs nothing under 300 MiB. Both are sparse.
MAKE = {
    "ext4": (16, ["mkfs.ext4", "-q", "-F", "-m0", "-b", "1024", "-N", "512"]),
    "xfs": (300, ["mkfs.xfs", "-q", "-f"]),
}
OPTIONS = {"xfs": b"nouuid"}
"""Copies of one image are mounted at the same time."""
FILLER = "filler"
GOING_DOWN = struct.unpack("I", struct.pack("I", 2 << 30 | 4 << 16 | ord("X") << 8 | 125))[0]
"""The shutdown ioctl, _IOR('X', 125, __u32); ext4 has it under the number that xfs gave it."""
WITH_LOG, WITHOUT_LOG = 1, 2
"""How the power goes: with the journal written out before, or with what happens to be on the disk."""

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20000, 0x4000, 1 << 18, 2
_GET_FREE, _CONFIGURE, _AUTOCLEAR = 0x4C82, 0x4C0A, 4
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]


def unavailable() -> str:
    """Why this machine cannot make, mount and cut file systems; empty when it can."""
    if os.geteuid() != 0:
        return "it mounts file systems: root only"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    if missing := [kind for kind, (_, argv) in MAKE.items() if not shutil.which(argv[0])]:
        return f"mkfs for {' and '.join(missing)} is missing: scripts/crash-setup"
    return ""


def alone() -> None:
    """Give this process mounts of its own; they end with it."""
    _checked(_libc.unshare(_CLONE_NEWNS), "unshare")
    _checked(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "/")


def make(kind: str, image: Path, size: int = 0, *options: str) -> Path:
    """A new file system in a sparse file of `size` MiB (the least it can be when not said)."""
    least, argv = MAKE[kind]
    with image.open("wb") as file:
        file.truncate((size or least) << 20)
    subprocess.run([*argv, *options, image], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return image


@contextmanager
def memory(place: Path, size: int, files: int) -> Iterator[Path]:
    """A tmpfs of `size` MiB and so many files."""
    place.mkdir(exist_ok=True)
    options = f"size={size}m,nr_inodes={files}".encode()
    _checked(_libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, options), str(place))
    try:
        yield place
    finally:
        unmount(place)


def fill(place: Path, what: str) -> None:
    """Take every block, or every file, that the file system has left; `room` gives them back."""
    filler = place / FILLER
    filler.mkdir(exist_ok=True)
    with suppress(OSError):
        if what == "inodes":
            for number in itertools.count():
                (filler / str(number)).touch(exist_ok=False)
        handle = os.open(filler / "blocks", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            for piece in (1 << 20, 4096, 512, 1):
                with suppress(OSError):
                    while os.write(handle, bytes(piece)):
                        pass
            os.fsync(handle)
        finally:
            os.close(handle)


def room(place: Path) -> None:
    shutil.rmtree(place / FILLER, ignore_errors=True)  # a run that rested early never filled it


@contextmanager
def mounted(kind: str, image: Path, place: Path) -> Iterator[Path]:
    """The image, mounted at `place`; its journal is replayed as after a power cut."""
    place.mkdir(exist_ok=True)
    device, handle = _attach(image)
    try:
        _checked(
            _libc.mount(device.encode(), os.fsencode(place), kind.encode(), 0, OPTIONS.get(kind)), str(place)
        )
    finally:
        os.close(handle)  # the mount keeps it; without one it frees itself
    try:
        yield place
    finally:
        unmount(place)


def unmount(place: Path) -> None:
    for _ in range(200):
        if _libc.umount2(os.fsencode(place), 0) == 0:
            return
        if ctypes.get_errno() != errno.EBUSY:
            break
        time.sleep(0.01)  # a process that was killed there is still on its way out
    _checked(_libc.umount2(os.fsencode(place), _MNT_DETACH), str(place))


def cut_power(place: Path, how: int) -> None:
    """From now on nothing reaches the disk; every call on this file system fails."""
    handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(handle, GOING_DOWN, struct.pack("I", how))
    finally:
        os.close(handle)


def _attach(image: Path) -> tuple[str, int]:
    backing = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        while True:
            device = f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
            handle = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            info = struct.pack("=52xI176x", _AUTOCLEAR)
            try:
                fcntl.ioctl(handle, _CONFIGURE, struct.pack("=II", backing, 0) + info + bytes(64))
            except OSError as error:
                os.close(handle)
                if error.errno != errno.EBUSY:
                    raise
                continue  # another worker was quicker
            return device, handle
    finally:
        os.close(control)
        os.close(backing)


def _checked(result: int, name: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
