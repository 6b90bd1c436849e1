"""The wall of namespaces: processes, network and files of its own."""

import ctypes
import os

from libc import call, readable_folders

_NEW_NAMESPACES = (
    0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
)  # mount, UTS, IPC, PID, network
_NEW_USER = 0x10000000
_BIND, _REC, _PRIVATE, _REMOUNT = 0x1000, 0x4000, 0x40000, 0x20
_READ_ONLY, _NO_SUID, _NO_DEV = 0x1, 0x2, 0x4
_DETACH = 2
_MOUNT_SETATTR = 442  # on every processor
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}


def enter():
    """New namespaces for this process and its children; as an ordinary user inside a user namespace."""
    if os.geteuid() == 0:
        try:
            call("unshare", _NEW_NAMESPACES)
            return
        except OSError:
            pass  # root of a container, without the right to
    user, group = os.geteuid(), os.getegid()
    call("unshare", _NEW_USER | _NEW_NAMESPACES)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def change_root(folder, file_bytes):
    """A root of its own in memory: an empty folder /tmp, and read-only what the interpreter needs."""
    call("mount", None, b"/", None, _REC | _PRIVATE, None)
    options = f"size={4 * file_bytes},nr_inodes=1024,mode=755".encode()
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", _NO_SUID | _NO_DEV, options)
    for path in readable_folders():
        place = (folder + path).encode()
        os.makedirs(place, exist_ok=True)
        call("mount", os.path.realpath(path).encode(), place, None, _BIND | _REC, None)
        _make_read_only(place)
    os.makedirs(folder + "/tmp", exist_ok=True)
    os.chmod(folder + "/tmp", 0o1777)
    os.chdir(folder)
    machine = os.uname().machine
    if machine not in _PIVOT_ROOT:
        raise OSError(38, f"pivot_root: unknown on the processor {machine}")
    call("syscall", _PIVOT_ROOT[machine], b".", b".")
    call("umount2", b".", _DETACH)
    os.chdir("/tmp")


def _make_read_only(place):
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY | _NO_SUID | _NO_DEV, 0, 0, 0)
    try:
        call(
            "syscall", _MOUNT_SETATTR, -100, place, 0x8000, attributes, ctypes.sizeof(attributes)
        )  # recursive
    except OSError:  # before Linux 5.12; flags that the mount has must stay
        kept = os.statvfs(place).f_flag & (_NO_SUID | _NO_DEV | 0x8 | 0x400 | 0x800)
        call("mount", None, place, None, _REMOUNT | _BIND | _READ_ONLY | kept, None)
