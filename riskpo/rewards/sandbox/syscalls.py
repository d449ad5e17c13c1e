"""Linux calls that Python has no function for, and the filter of system calls. Standard library.

Used inside a sandbox process only (riskpo/rewards/sandbox/child.py). Sources: unshare(2),
pivot_root(2), mount_setattr(2), capabilities(7), seccomp(2). System call numbers are those of
x86_64 and aarch64; elsewhere the sandbox refuses to start.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_THREAD = 0x10000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# (x86_64, aarch64); -1 where the machine has no such call
_NUMBERS = {
    "fork": (57, -1), "vfork": (58, -1), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "setpgid": (109, 154), "setsid": (112, 157), "ptrace": (101, 117), "kcmp": (312, 272),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "socket": (41, 198),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "init_module": (175, 105), "finit_module": (313, 273),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # memory outside RLIMIT_AS
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "mq_open": (240, 180), "semget": (64, 190),
    "personality": (135, 92),
}  # fmt: skip
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000  # the second table of system calls on x86_64

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _column() -> int:
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError(f"no table of system calls for {machine}")
    return list(_AUDIT_ARCH).index(machine)


def _number(name: str) -> int:
    return _NUMBERS[name][_column()]


def _call(name: str, *arguments: object) -> None:
    _checked(_libc.syscall(ctypes.c_long(_number(name)), *arguments), name)


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    texts = (source.encode(), target.encode(), kind.encode() or None)
    _checked(
        _libc.mount(*texts, ctypes.c_ulong(flags), data.encode() or None), f"mount {kind} {target}"
    )


def bind_readonly(source: str, target: str) -> None:
    """The same files at another place, recursively, without writing, set-uid or devices."""
    mount(source, target, "", MS_BIND | MS_REC)
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    size, recursive = ctypes.c_size_t(len(attributes)), 0x8000
    _call("mount_setattr", -1, target.encode(), recursive, attributes, size)


def pivot_root(new: str, old: str) -> None:
    _call("pivot_root", new.encode(), old.encode())


def detach(target: str) -> None:
    _checked(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def prctl(option: int, value: int, pointer: object = 0) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0), f"prctl {option}")


def drop_capabilities() -> None:
    """All three sets to nothing (capset, version 3)."""
    header = struct.pack("Ii", 0x20080522, 0)
    _checked(_libc.capset(header, struct.pack("6I", *[0] * 6)), "capset")


def _instruction(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, k)


def filter_system_calls() -> None:
    """Deny, with EPERM, new processes and programs, signals, sockets, tracing, namespaces, mounts,
    and memory that no limit counts. Threads stay possible. Needs no privilege.

    A list of what is denied, not of what is allowed: a Python release may need a new harmless
    call. It is the second fence; the namespaces are the first.
    """
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    deny, absent = 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
    column = _column()
    program = [
        _instruction(load, 4),
        _instruction(equal, _AUDIT_ARCH[platform.machine()], 1, 0),
        _instruction(give, kill),
        _instruction(load, 0),
    ]
    if platform.machine() == "x86_64":
        program += [_instruction(at_least, _X32, 0, 1), _instruction(give, kill)]
    special = {"clone": None, "clone3": absent}  # without clone3 libc falls back to clone
    for name, numbers in _NUMBERS.items():
        if name not in special and numbers[column] >= 0:
            program += [_instruction(equal, numbers[column], 0, 1), _instruction(give, deny)]
    program += [
        _instruction(equal, _number("clone3"), 0, 1),
        _instruction(give, absent),
        _instruction(equal, _number("clone"), 0, 3),
        _instruction(load, 16),  # its flags
        _instruction(any_bit, CLONE_THREAD, 1, 0),
        _instruction(give, deny),
        _instruction(give, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(program))
    head = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    prctl(PR_SET_SECCOMP, 2, head)
