"""Run a program nobody trusts: no network, no files but a scratch folder, limits on everything.

Two levels, and never a silent step from the first to the second:

  "namespaces"   namespaces and a root of its own, no capability, a filter of system calls, limits
                 on CPU, memory, threads and files; wall clock and output are watched from outside
  "limits"       the filter and the limits only. The program can read what you can read, and delete
                 what you can delete. For a machine or container that is thrown away afterwards.

docs/sandbox.md says what is promised, what is not, and which machines allow it. The promises are
tried in tests/rewards/test_sandbox.py.
"""

from __future__ import annotations

import json
import os
import platform
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

LEVELS = ("namespaces", "limits")
ERROR_BYTES = 4096
START_SECONDS = 60.0  # for the doors to shut, on a busy machine
CPU_STATUS = (152, 137, -24, -9)  # SIGXCPU, SIGKILL; through process 1, or directly
BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from riskpo.rewards.sandbox.child import main; main()"
)
ROLES = "riskpo.rewards.sandbox.roles"
Streams = tuple[int, int, int]
SHUT = (subprocess.DEVNULL,) * 3


class SandboxUnavailable(RuntimeError):
    """This machine does not allow the isolation that was asked for; the message says why."""


@dataclass(frozen=True)
class Limits:
    """seconds: wall clock, and CPU to the next full second; output_bytes: standard output."""

    seconds: float = 5.0
    memory_mib: int = 1024
    threads: int = 32
    output_bytes: int = 2**24
    scratch_mib: int = 16


@dataclass(frozen=True)
class Finished:
    """How a program ended. limit is "", "time" or "output"; status is None when it was killed."""

    output: bytes
    errors: str
    status: int | None
    limit: str

    @property
    def ok(self) -> bool:
        return self.status == 0 and not self.limit


def run_program(
    program: str, stdin: str, *, limits: Limits | None = None, level: str = "namespaces"
) -> Finished:
    """Run Python source as a program of its own and collect what it prints.

    ValueError for an unknown level; SandboxUnavailable when the sandbox cannot be built.
    """
    limits = limits or Limits()
    with _inputs(program=program, stdin=stdin, errors="") as files:
        streams = (files["stdin"], subprocess.PIPE, files["errors"])
        with Sandbox("script", {"program": files["program"]}, limits, level, streams) as child:
            return child.collect(limits, files["errors"])


def run_tests(
    program: str, task: dict[str, object], *, limits: Limits | None = None, level: str = LEVELS[0]
) -> tuple[str, str]:
    """(outcome, detail) of tests that call a program; the two run in sandboxes of their own.

    task: {"tests": source, "helpers": source that the tests may use, "entries": names that come
    from the program even where the helpers define them}. outcome is "right", "wrong", "timeout",
    "unparsable_gold" or "crash", by the rules of riskpo/rewards/verdict.py.
    """
    limits = limits or Limits()
    patient = replace(limits, seconds=limits.seconds + 2)  # the judge waits for the program
    ask_r, ask_w = os.pipe()
    reply_r, reply_w = os.pipe()
    verdict_r, verdict_w = os.pipe()
    pipes = [ask_r, ask_w, reply_r, reply_w, verdict_w]
    try:
        with _inputs(program=program, tests=json.dumps(task)) as files:
            served = {"program": files["program"], "requests": ask_r, "replies": reply_w}
            judged = {"requests": ask_w, "replies": reply_r, "verdict": verdict_w}
            judged["program"] = files["tests"]
            with (
                Sandbox("serve", served, limits, level) as candidate,
                Sandbox("judge", judged, patient, level) as judge,
            ):
                candidate.ready()
                judge.ready()
                while pipes:
                    os.close(pipes.pop())
                text = _read_until(verdict_r, 65536, time.monotonic() + limits.seconds)
                if text is not None:
                    judge.process.wait(START_SECONDS)
                return _verdict(text, candidate)
    finally:
        for channel in (*pipes, verdict_r):
            os.close(channel)


def _verdict(text: bytes | None, candidate: Sandbox) -> tuple[str, str]:
    if text is None:
        return "timeout", "the time limit of the program"
    try:
        reply = json.loads(text)
        outcome, detail = str(reply["outcome"]), str(reply["detail"])
    except (ValueError, KeyError, TypeError):
        return "crash", f"the judge ended without a verdict: {text[:80]!r}"
    if outcome == "wrong" and candidate.killed():
        return "timeout", f"killed, out of CPU time or memory; {detail}"
    return outcome, detail


class Sandbox:
    """One isolated process that plays a role of riskpo/rewards/sandbox/roles.py; a context manager.

    channels   role's name for a file descriptor -> the descriptor, handed over as it is
    streams    standard input, output and error, as subprocess.Popen takes them
    """

    def __init__(
        self,
        role: str,
        channels: dict[str, int],
        limits: Limits,
        level: str,
        streams: Streams = SHUT,
    ) -> None:
        _check(level)
        self._status, status = os.pipe()
        role = role if ":" in role else f"{ROLES}:{role}"
        setup = {**asdict(limits), **channels, "role": role, "level": level, "status": status}
        root = str(Path(__file__).resolve().parents[3])
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-B", "-c", BOOT, root, json.dumps(setup)],
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                pass_fds=(status, *channels.values()),
                env=_environment(),
                cwd="/",
            )
        except BaseException:
            os.close(self._status)
            raise
        finally:
            os.close(status)

    def ready(self) -> None:
        """Wait until the doors are shut; SandboxUnavailable when one of them does not shut."""
        if self._status < 0:
            return
        text = _read_until(self._status, 65536, time.monotonic() + START_SECONDS)
        os.close(self._status)
        self._status = -1
        if text:
            raise SandboxUnavailable(text.decode(errors="replace"))
        if text is None:
            raise SandboxUnavailable(f"it did not start within {START_SECONDS:.0f} s")

    def collect(self, limits: Limits, errors: int) -> Finished:
        """Read the output until the program ends or meets a limit, then the head of `errors`."""
        self.ready()
        assert self.process.stdout is not None
        deadline = time.monotonic() + limits.seconds
        output = _read_until(self.process.stdout.fileno(), limits.output_bytes, deadline)
        if output is None or len(output) > limits.output_bytes:
            return Finished(b"", "", None, "time" if output is None else "output")
        try:
            status = self.process.wait(max(0.0, deadline - time.monotonic()) + 1)
        except subprocess.TimeoutExpired:
            return Finished(output, "", None, "time")
        out_of_time = "time" if status in CPU_STATUS else ""
        text = os.pread(errors, ERROR_BYTES, 0).decode(errors="replace")
        return Finished(output, text, status, out_of_time)

    def killed(self) -> bool:
        """Whether the process is over, or is about to be, for its use of CPU or memory."""
        try:
            return self.process.wait(0.5) in CPU_STATUS
        except subprocess.TimeoutExpired:
            return False

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill and reap; the kernel takes the rest of the process namespace along."""
        if self._status >= 0:
            os.close(self._status)
            self._status = -1
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@cache
def require(level: str = "namespaces") -> None:
    """Try the isolation once on this machine. SandboxUnavailable says what is missing."""
    _check(level)
    try:
        if platform.system() != "Linux":
            raise SandboxUnavailable(f"this is {platform.system()}, not Linux")
        done = run_program("print(6 * 7)", "", level=level, limits=Limits(seconds=20))
        if not done.ok or done.output != b"42\n":
            raise SandboxUnavailable(f"a trial program failed: {done}")
    except (SandboxUnavailable, OSError) as error:
        weaker = (
            "As root give the container CAP_SYS_ADMIN (docker: --cap-add SYS_ADMIN --security-opt "
            "seccomp=unconfined), or allow user namespaces to your user "
            "(sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces, "
            "kernel.apparmor_restrict_unprivileged_userns). Only on a machine that may be damaged: "
            'reward "code-limits-only" runs without namespaces.'
        )
        raise SandboxUnavailable(
            f"sandbox: isolation by {level} does not work here: {error}. "
            + (weaker if level == "namespaces" else "Run on Linux, x86_64 or aarch64.")
        ) from None


def _check(level: str) -> None:
    if level not in LEVELS:
        raise ValueError(
            f"sandbox: got level={level!r}; expected one of {', '.join(LEVELS)}. Choose one."
        )


def _environment() -> dict[str, str]:
    """A fixed hash seed, so that a program gets the same reward twice; nothing of the caller's."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {**kept, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "HOME": "/tmp", "PATH": "/usr/bin"}


@contextmanager
def _inputs(**texts: str) -> Iterator[dict[str, int]]:
    """Texts as anonymous files in memory, by name, to hand to a process."""
    channels: dict[str, int] = {}
    with ExitStack() as opened:
        for name, text in texts.items():
            file = opened.enter_context(os.fdopen(os.memfd_create(name), "wb"))
            file.write(text.encode(errors="surrogateescape"))
            file.seek(0)
            channels[name] = file.fileno()
        yield channels


def _read_until(channel: int, limit: int, deadline: float) -> bytes | None:
    """Up to the end, or just beyond `limit` bytes; None when the deadline comes first."""
    data = bytearray()
    while len(data) <= limit:
        ready, _, _ = select.select([channel], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(channel, 65536)
        if not part:
            break
        data += part
    return bytes(data)
