"""The wall of seccomp: a filter of system calls."""

import ctypes
import os

from libc import call

# What the filter refuses, as (x86-64, arm64) numbers; None where the processor lacks the call.
_REFUSED = {
    # sockets, and what makes them without a socket call
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # other processes: new ones, other programs, signals, their memory and priorities
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    # the walls themselves
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    # what Landlock does not cover: names, owners and times of files
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    # memory beyond the limit on the address space, or that outlives the process
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # corners of the kernel that no program here needs
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "syslog": (103, 116),
}
_CLONE, _CLONE3, _TGKILL, _PRLIMIT = (56, 220), 435, (234, 131), (302, 261)
_PROCESSORS = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def filter_calls():
    """Refused calls fail from now on with EPERM; threads may start, processes may not."""
    machine = os.uname().machine
    if machine not in _PROCESSORS:
        raise OSError(38, f"no filter of system calls for the processor {machine}")
    column, architecture = _PROCESSORS[machine]
    load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050001
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":
        program += [(at_least, 0, 1, 0x40000000), (leave, 0, 0, refuse)]  # the x32 numbers
    for numbers in _REFUSED.values():
        if numbers[column] is not None:
            program += [(equal, 0, 1, numbers[column]), (leave, 0, 0, refuse)]
    # The C library starts threads with clone where clone3 is unknown; clone's flags can be looked at.
    program += [(equal, 0, 1, _CLONE3), (leave, 0, 0, 0x00050000 | 38)]
    for number, test, value in (
        (_CLONE[column], any_bit, 0x00010000),  # CLONE_THREAD
        (_TGKILL[column], equal, os.getpid()),
        (_PRLIMIT[column], equal, 0),
    ):
        program += [(equal, 0, 4, number), (load, 0, 0, 16), (test, 0, 1, value)]
        program += [(leave, 0, 0, allow), (leave, 0, 0, refuse)]
    program.append((leave, 0, 0, allow))

    class Instruction(ctypes.Structure):
        _fields_ = [
            ("code", ctypes.c_uint16),
            ("then", ctypes.c_uint8),
            ("otherwise", ctypes.c_uint8),
            ("value", ctypes.c_uint32),
        ]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction))]

    instructions = (Instruction * len(program))(*program)
    call("prctl", 22, 2, ctypes.byref(Program(len(program), instructions)), 0, 0)  # PR_SET_SECCOMP
