"""This module is the one way in which a device touches its disk, so that whoever watches sees all of it.

Each function is the system call of its name, and costs one comparison when nobody watches. The crash proof
(`tests/crash`) watches: it notes every operation, cuts the power before or after any of them, and lets any of
them fail. What goes around this module goes around that proof; ruff refuses it. The launcher carries this
file, so it needs the standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat as modes
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Callable, TypeVar, Union

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Optional, Protocol

    Path = Union[str, os.PathLike[str]]

    class Observer(Protocol):
        """Sees each operation before and after it; `before` may raise, and then it does not happen."""

        def before(self, name: str, words: tuple[Any, ...], options: dict[str, Any]) -> None:
            """Raise an `OSError` to let it fail, or something else to stop the run here."""

        def after(self, name: str, words: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
            """`result` is what it returned, or the `OSError` it failed with."""


R = TypeVar("R")
READ = 1 << 16
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_FALLOC_FL_KEEP_SIZE = 1
_AT_FDCWD = -100
_observer: Optional[Observer] = None


@contextmanager
def watched_by(observer: Observer) -> Iterator[None]:
    """Show every operation of this process to `observer`; one at a time."""
    global _observer  # noqa: PLW0603 - one disk, one seam
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def _do(name: str, call: Callable[..., R], *words: Any, **options: Any) -> R:
    observer = _observer
    if observer is None:
        return call(*words, **options)
    observer.before(name, words, options)
    try:
        result = call(*words, **options)
    except OSError as error:
        observer.after(name, words, options, error)
        raise
    observer.after(name, words, options, result)
    return result


# --- files by handle --------------------------------------------------------------------------------------


def open(path: Path, flags: int, mode: int = 0o777, *, dir_fd: Optional[int] = None) -> int:  # noqa: A001
    """A handle that is closed on exec; `mode` is for a file that this makes."""
    return _do("open", os.open, path, flags | os.O_CLOEXEC, mode, dir_fd=dir_fd)


def open_dir(path: Path, *, dir_fd: Optional[int] = None, follow: bool = False) -> int:
    """A handle of a directory; a link in its place is refused unless it is to be followed."""
    flags = os.O_RDONLY | os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW)
    return open(path, flags, dir_fd=dir_fd)


def close(handle: int) -> None:
    _do("close", os.close, handle)


def read(handle: int, most: int) -> bytes:
    return _do("read", os.read, handle, most)


def pread(handle: int, most: int, offset: int) -> bytes:
    return _do("pread", os.pread, handle, most, offset)


def write(handle: int, content: Union[bytes, memoryview]) -> int:
    return _do("write", os.write, handle, content)


def write_all(handle: int, content: Union[bytes, memoryview]) -> None:
    """Write all of it, in as many calls as that takes."""
    view = memoryview(content)
    while view:
        view = view[write(handle, view) :]


def pwrite(handle: int, content: Union[bytes, memoryview], offset: int) -> int:
    return _do("pwrite", os.pwrite, handle, content, offset)


def ftruncate(handle: int, length: int) -> None:
    _do("ftruncate", os.ftruncate, handle, length)


def allocate(handle: int, length: int) -> None:
    """Take the room of a file's first `length` bytes, and grow it to them."""
    _do("allocate", os.posix_fallocate, handle, 0, length)


def reserve(handle: int, length: int) -> None:
    """Take the room of `length` bytes without growing the file: its size still says what has arrived.

    `posix_fallocate` would grow it, so the system call is asked directly. A file system that cannot (or a C
    library that has no such call) only means that a full disk shows later, while writing.
    """
    _do("reserve", _reserve, handle, length)


def fsync(handle: int) -> None:
    _do("fsync", os.fsync, handle)


def fdatasync(handle: int) -> None:
    _do("fdatasync", os.fdatasync, handle)


def syncfs(handle: int) -> None:
    """Start writing everything of this file system; only speed, `fsync` is the guarantee."""
    _do("syncfs", _syncfs, handle)


def fchmod(handle: int, mode: int) -> None:
    _do("fchmod", os.fchmod, handle, mode)


def fstat(handle: int) -> os.stat_result:
    return _do("fstat", os.fstat, handle)


def flock(handle: int, how: int) -> None:
    _do("flock", fcntl.flock, handle, how)


# --- names ------------------------------------------------------------------------------------------------


def rename(source: Path, target: Path) -> None:
    """Give a file another name, in the place of whatever had that name."""
    _do("rename", os.rename, source, target)


def rename_exchange(one: Path, other: Path) -> None:
    """Swap two names in one step, which needs no room; `ENOSYS` or `EINVAL` where that does not exist."""
    _do("rename_exchange", _rename_exchange, one, other)


def rename_new(source: Path, target: Path) -> None:
    """Rename, but never over something; a file system that cannot promise that is asked first."""
    _do("rename_new", _rename_new, source, target)


def symlink(text: str, path: Path) -> None:
    _do("symlink", os.symlink, text, path)


def readlink(path: Path) -> str:
    text: str = _do("readlink", os.readlink, os.fspath(path))
    return text


def unlink(path: Path, *, dir_fd: Optional[int] = None) -> None:
    _do("unlink", os.unlink, path, dir_fd=dir_fd)


def mkdir(path: Path, mode: int = 0o777, *, dir_fd: Optional[int] = None) -> None:
    _do("mkdir", os.mkdir, path, mode, dir_fd=dir_fd)


def rmdir(path: Path, *, dir_fd: Optional[int] = None) -> None:
    _do("rmdir", os.rmdir, path, dir_fd=dir_fd)


def chmod(path: Path, mode: int) -> None:
    _do("chmod", os.chmod, path, mode)


def listdir(path: Union[Path, int]) -> list[str]:
    """The names in a directory, given by path or by handle."""
    return _do("listdir", os.listdir, path)


def stat(path: Path, *, dir_fd: Optional[int] = None, follow: bool = True) -> os.stat_result:
    return _do("stat", os.stat, path, dir_fd=dir_fd, follow_symlinks=follow)


def statvfs(path: Path) -> os.statvfs_result:
    return _do("statvfs", os.statvfs, path)


# --- what is made of these --------------------------------------------------------------------------------


def fsync_dir(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    handle = open_dir(path, follow=True)
    try:
        fsync(handle)
    finally:
        close(handle)


def read_file(path: Path, most: int = 1 << 62) -> bytes:
    """All bytes of a file; a pipe in its place is not waited for, and is as good as an empty file.

    Raises:
        OSError: also `EFBIG`, when there are more than `most`.
    """
    handle, pieces = open(path, os.O_RDONLY | os.O_NONBLOCK), []
    try:
        while piece := read(handle, READ):
            pieces.append(piece)
            most -= len(piece)
            if most < 0:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    finally:
        close(handle)
    return b"".join(pieces)


def remove(path: Path) -> None:
    """Unlink; that there is no such file is fine."""
    with suppress(FileNotFoundError):
        unlink(path)


def make_dirs(path: Path, mode: int = 0o777) -> None:
    """Make a directory and what is missing above it; that it is there already is fine."""
    path = os.fspath(path)
    if path and not exists(path):
        make_dirs(os.path.dirname(path))
        with suppress(FileExistsError):
            mkdir(path, mode)


def exists(path: Path) -> bool:
    """Whether something has this name.

    Raises:
        OSError: the disk does not say, which is another thing than no; so do the next two.
    """
    return _mode(path) != 0


def is_file(path: Path) -> bool:
    return modes.S_ISREG(_mode(path))


def is_link(path: Path) -> bool:
    return modes.S_ISLNK(_mode(path, follow=False))


def _mode(path: Path, *, follow: bool = True) -> int:
    try:
        return stat(path, follow=follow).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return 0
        raise


# --- calls that Python does not have ----------------------------------------------------------------------


def _libc(*names: str) -> Any:
    """The first of these that the C library has, or None."""
    libc = ctypes.CDLL(None, use_errno=True)
    return next(filter(None, (getattr(libc, name, None) for name in names)), None)


def _renameat2(source: Path, target: Path, flags: int) -> int:
    """The error's number, 0 when it is done."""
    call = _libc("renameat2")
    if call is None:
        return errno.ENOSYS
    names = os.fsencode(source), os.fsencode(target)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(flags)) == 0:
        return 0
    return ctypes.get_errno()


def _rename_exchange(one: Path, other: Path) -> None:
    if code := _renameat2(one, other, _RENAME_EXCHANGE):
        raise OSError(code, os.strerror(code), os.fspath(one))


def _rename_new(source: Path, target: Path) -> None:
    code = _renameat2(source, target, _RENAME_NOREPLACE)
    if code in (errno.ENOSYS, errno.EINVAL):
        if not os.path.lexists(target):
            os.rename(source, target)
            return
        code = errno.EEXIST
    if code:
        raise OSError(code, os.strerror(code), os.fspath(target))


def _reserve(handle: int, length: int) -> None:
    # On 32 bits glibc's plain name takes short offsets; musl has the plain name only, and it is long there.
    call = _libc("fallocate64", "fallocate")
    if call is None:
        return
    if call(handle, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(length)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))


def _syncfs(handle: int) -> None:
    call = _libc("syncfs")
    if call is not None and call(handle) != 0 and ctypes.get_errno() != errno.ENOSYS:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
