"""The inside of a sandbox: shut the doors, then play one role. Standard library only.

Three processes. The first makes the namespaces; its child is process 1 of the new process
namespace and builds the file system; the child of that takes the limits and the filter, and runs
the program. When process 1 ends, the kernel kills whatever is left in its namespace.

Nothing here decides about right or wrong: that happens in another process, which the program
cannot reach; see riskpo/rewards/code.py.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import secrets
import signal
import sys
import sysconfig
import time
from typing import Any

from riskpo.rewards.sandbox import syscalls as kernel

SETUP_FAILED = 70  # exit status; the reason is in the status pipe
GRACE_SECONDS = 5.0  # after the limit process 1 ends everything, even if nobody outside watches
SCRATCH = "/tmp"
MACHINE_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
OTHER_ID = 2**30  # ids from here on belong to nobody, so that limits per user are not shared
SEPARATE = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
SEPARATE |= kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP


def main() -> None:
    """argv: [folder of the package riskpo, setup as JSON]; see riskpo/rewards/sandbox/run.py."""
    setup = json.loads(sys.argv[2])
    sys.argv[:] = ["program.py"]
    sys.path[:] = [p for p in sys.path[1:] if p]
    module, _, name = setup["role"].partition(":")
    role = getattr(importlib.import_module(module), name)  # before the files disappear
    try:
        if setup["level"] == "namespaces":
            _enter_namespaces()
            _in_child(lambda: _as_first_process(setup, role))
        else:
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            _play(setup, role)
    except Exception as error:
        _report(setup["status"], f"{type(error).__name__}: {error}")
        os._exit(SETUP_FAILED)


def _enter_namespaces() -> None:
    """As root: without a user namespace, and later as an id that owns nothing. Else: within one."""
    if os.geteuid() == 0:
        kernel.unshare(SEPARATE)
        return
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER | SEPARATE)
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _in_child(job: Any) -> None:
    """Run `job` in a fork and end as it ends: its status, or 128 + the signal that killed it."""
    child = os.fork()
    if child == 0:
        job()
        os._exit(0)
    os.closerange(0, 64)  # the ends of pipes belong to the program alone
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(128 - code if code < 0 else code)


def _as_first_process(setup: dict[str, Any], role: Any) -> None:
    try:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, setup["seconds"] + GRACE_SECONDS)
        _build_root(setup["scratch_mib"])
        if os.geteuid() == 0:
            nobody = OTHER_ID + secrets.randbits(28)
            os.setgroups([])
            os.setresgid(nobody, nobody, nobody)
            os.setresuid(nobody, nobody, nobody)
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of id forgets it
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    except Exception as error:
        _report(setup["status"], f"{type(error).__name__}: {error}")
        os._exit(SETUP_FAILED)
    _in_child(lambda: _play(setup, role))


def _build_root(scratch_mib: int) -> None:
    """A new root: Python's library, the machine's libraries and four devices, read-only; a scratch
    folder; nothing else. No /proc, no /sys, no /etc, no home, no installed packages."""
    sources = [(path, os.path.realpath(path)) for path in _readable()]
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", "/tmp", "tmpfs", flags, "size=1m,mode=755")
    os.chdir("/tmp")  # the tmpfs above, which this process alone sees
    os.mkdir("old")
    kernel.pivot_root(".", "old")
    os.chdir("/")
    shown: list[str] = []
    for path, real in sources:
        if not any(path.startswith(f"{parent}/") for parent in shown):
            shown += [path] if _show(path, "/old" + real) else []
    for packages in _package_folders():  # data sets may lie in there
        if os.path.isdir(packages):
            kernel.mount("tmpfs", packages, "tmpfs", flags | kernel.MS_RDONLY, "size=4k")
    os.mkdir(SCRATCH)
    size = f"size={scratch_mib}m,nr_inodes=1024,mode=1777"
    kernel.mount("tmpfs", SCRATCH, "tmpfs", flags | kernel.MS_NOEXEC, size)
    kernel.detach("/old")
    os.rmdir("/old")
    kernel.mount("none", "/", "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | flags)
    os.chdir(SCRATCH)


def _readable() -> list[str]:
    libraries = os.path.join(sys.base_prefix, "lib")
    python = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    return [*MACHINE_LIBRARIES, libraries, *python, "/etc/ld.so.cache", *DEVICES]


def _package_folders() -> list[str]:
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")} | {"/usr/lib/python3"}
    return [os.path.join(f, name) for f in folders for name in ("site-packages", "dist-packages")]


def _show(path: str, source: str) -> bool:
    """Put one file or folder of the old root at its old place; False where there is none."""
    if not os.path.exists(source):
        return False
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    if path in DEVICES:
        kernel.mount(source, path, "", kernel.MS_BIND)
    else:
        kernel.bind_readonly(source, path)
    return True


def _play(setup: dict[str, Any], role: Any) -> None:
    """Limits, filter, then the role; ends this process."""
    try:
        _limit(setup)
        for channel in (0, 1, 2):
            try:
                os.fstat(channel)
            except OSError:
                os.open("/dev/null", os.O_RDWR)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        kernel.filter_system_calls()
    except Exception as error:
        _report(setup["status"], f"{type(error).__name__}: {error}")
        os._exit(SETUP_FAILED)
    _report(setup["status"], "")
    code = 1
    try:
        code = role(setup)
    finally:
        os._exit(code)


def _limit(setup: dict[str, Any]) -> None:
    def cap(what: int, soft: int, hard: int | None = None) -> None:
        ceiling = resource.getrlimit(what)[1]
        hard = soft if hard is None else hard
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(what, (soft, hard))

    cpu = int(time.process_time() + setup["seconds"]) + 1
    cap(resource.RLIMIT_CORE, 0)
    cap(resource.RLIMIT_CPU, cpu, cpu + 1)
    cap(resource.RLIMIT_AS, setup["memory_mib"] * 2**20)
    cap(resource.RLIMIT_FSIZE, setup["scratch_mib"] * 2**20)
    cap(resource.RLIMIT_NOFILE, 64)
    cap(resource.RLIMIT_NPROC, setup["threads"])


def _report(channel: int, text: str) -> None:
    """The end of the status pipe: empty when the sandbox stands, else why it does not."""
    try:
        os.write(channel, text.encode()[:2000])
        os.close(channel)
    except OSError:  # reported already
        return
