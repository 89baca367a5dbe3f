"""Locks on open files: the system releases them when their process ends, however it ends."""

from __future__ import annotations

import errno
import os
import sys

if sys.platform != "win32":
    import fcntl

_BUSY = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
_held: set[int] = set()


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file for this process.

    Returns:
        False where somebody else holds the lock; None where there are no such locks (the platform
        or the file system has none).
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _BUSY else None
    _held.add(descriptor)
    return True


def release(descriptor: int) -> None:
    """Close a file that was opened to be locked, and with it give up the lock."""
    _held.discard(descriptor)
    os.close(descriptor)


def _close_in_child() -> None:
    # A forked reader process would go on holding the lock after its parent was killed.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
