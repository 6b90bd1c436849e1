"""Calls of the C library and the kernel, and what several walls share."""

import ctypes
import os
import sys

_libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None


def call(function, *arguments):
    """A call of the C library or the kernel; raises OSError with its name when it fails."""
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = getattr(_libc, function)(*converted)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


def readable_folders():
    """The folders that an interpreter needs: its standard library and the system's shared libraries."""
    wanted = [
        *sys.path,
        os.path.join(sys.base_exec_prefix, "lib"),
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
    ]
    kept = []
    for path in sorted({os.path.abspath(path) for path in wanted if os.path.isdir(path)}, key=len):
        if not any(path.startswith(other + "/") for other in kept):
            kept.append(path)
    return kept
