"""The wall of Landlock: reading what the interpreter needs, and nothing else."""

import ctypes
import os
import sys

from libc import call, readable_folders

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # on every processor


def restrict_files(writable):
    """Reading what the interpreter needs, everything in the working folder if `writable`, nothing else."""
    version = call("syscall", _CREATE, None, 0, 1)
    if version < 3:  # it would leave truncating
        raise OSError(38, f"Landlock of version {version}, expected 3 or later")
    everything = (1 << (16 if version >= 5 else 15)) - 1
    attributes = (ctypes.c_uint64 * 3)(everything, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 * (1 + (version >= 4) + (version >= 6))
    rules = call("syscall", _CREATE, attributes, size, 0)
    read = 0x4 | 0x8
    allowed = [(path, read) for path in readable_folders()] + [
        (os.getcwd(), everything if writable else read)
    ]
    for path, rights in allowed:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = rights.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
        call("syscall", _ADD, rules, 1, rule, 0)
        os.close(place)
    call("syscall", _RESTRICT, rules, 0)
    os.close(rules)
