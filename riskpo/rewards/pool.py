"""Killable worker processes, the only place where untrusted text is parsed.

Each worker has its own pair of pipes and shares no lock, so a worker that is killed or stuck in C
code loses its own item alone. A thread talks to it, and a timer kills it at the limit with SIGKILL
(SIGALRM can be ignored, and math-verify's use of it cancels others).

Pebble does not fit: it waits 3 s before it kills (a limit of 1 s took 4.1 s), its workers share one
locked pipe, results travel as pickle, and spawn imports the main module.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from riskpo.rewards.verdict import OUT_OF_MEMORY, Outcome, Verdict, failed

START_SECONDS = 120.0  # imports on a busy machine
REPLY_BYTES = 65536
ATTEMPTS = 2
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from riskpo.rewards.worker import main; main()"
)
X = TypeVar("X")
Y = TypeVar("Y")


class VerifierPool:
    """Calls `verify` on many items in killable processes; results keep the order of the items.

    verify      "package.module:function" or "file.py:function", called with the parts of one item
                (JSON values; a dict arrives as a SimpleNamespace); returns a Verdict or a number
    workers     processes
    seconds     wall clock per item; the process is killed and replaced there: `timeout`
    memory_mib  address space per process beside what importing `verify` takes, where the system
                can limit it

    A process that dies over an item (killed from outside, os._exit, out of memory) is replaced and
    the item tried once more on the fresh one; a second death makes it `crash`. An exception in
    `verify` is `crash` at once. Nothing is ever reported as wrong that was not compared.
    """

    def __init__(
        self, verify: str, *, workers: int = 2, seconds: float = 5.0, memory_mib: int = 2048
    ) -> None:
        if workers < 1 or seconds <= 0 or memory_mib < 1:
            raise ValueError(
                f"VerifierPool: got workers={workers}, seconds={seconds}, memory_mib={memory_mib}; "
                "expected all above 0. Set verifier_workers and verifier_seconds accordingly."
            )
        setup = {"function": verify, "seconds": seconds, "memory_mib": memory_mib}
        every = [_Worker(setup) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in every:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers)
        self._finalizer = weakref.finalize(self, _close_all, every)
        self._each(_Worker.ensure, every)

    def run(self, items: Sequence[Sequence[Any]]) -> list[Verdict]:
        """One verdict per item, in order."""
        if not self._finalizer.alive:
            raise ValueError(
                "VerifierPool: got a closed pool; expected an open one. Make a new one."
            )
        return self._each(self._judge, items)

    def _judge(self, item: Sequence[Any]) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.judge(item)
        finally:
            self._idle.put(worker)

    def _each(self, job: Callable[[X], Y], given: Iterable[X]) -> list[Y]:
        """`job` of each, a thread for every worker; no process is left if one raises."""
        try:
            return list(self._threads.map(job, given))
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def close(self) -> None:
        """Kill and reap every worker; the pool cannot be used afterwards."""
        self._finalizer()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """One process at a time, in which `verify` is called. One thread at a time uses it."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup = setup
        self._closing = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None

    def judge(self, item: Sequence[Any]) -> Verdict:
        """The verdict on one item; a process that dies over it is replaced, and asked once more."""
        seconds, fate = self._setup["seconds"], ""
        for _ in range(ATTEMPTS):
            process = self.ensure()
            reply, late = _exchange(process, {"arguments": list(item)}, seconds)
            with suppress(KeyError, TypeError, ValueError):  # no verdict: trust it no further
                outcome, detail = Outcome(reply["outcome"]), str(reply["detail"])
                return Verdict(float(reply["reward"]), outcome, detail)
            fate = _fate(process)
            if late:
                return failed(Outcome.TIMEOUT, f"killed after {seconds:g} s")
        return failed(Outcome.CRASH, f"verifier process {fate}, {ATTEMPTS} times")

    def ensure(self) -> subprocess.Popen[bytes]:
        """A live process: the present one, or a fresh one in place of a dead one.

        RuntimeError when the verifier cannot be imported.
        """
        if self._process is not None and self._process.poll() is None:
            return self._process
        process, verify = self._launch(), f"verifier {self._setup['function']}"
        reply, late = _exchange(process, self._setup, START_SECONDS)
        if "ready" in reply:
            return process
        fate = f"not ready after {START_SECONDS:.0f} s" if late else _fate(process)
        self._stop()
        if "error" not in reply:
            raise RuntimeError(f"{verify}: its process {fate}.")
        raise RuntimeError(
            f"{verify} cannot be imported: {reply['error']}. Check the path, and that it imports "
            f"on its own in {os.getcwd()}."
        )

    def _launch(self) -> subprocess.Popen[bytes]:
        with self._closing:
            if self._closed:
                raise RuntimeError("VerifierPool: closed while it was working.")
            self._stop()
            self._process = subprocess.Popen(
                # A console script does not look into the current folder, where a reward may be.
                [sys.executable, "-c", BOOT, json.dumps([*sys.path, os.getcwd()])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # so that what a verifier started dies with it
            )
            return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        _kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # unsent bytes of a dead worker
                if pipe is not None:
                    pipe.close()

    def close(self) -> None:
        """Kill and reap for good: a thread that is still at work starts no new process."""
        with self._closing:
            self._closed = True
            self._stop()


def _exchange(
    process: subprocess.Popen[bytes], message: object, seconds: float
) -> tuple[dict[str, Any], bool]:
    """(the reply, whether the process was killed because it took too long); {} without a reply."""
    assert process.stdin is not None and process.stdout is not None
    late = threading.Event()

    def expire() -> None:
        late.set()
        _kill(process)

    clock = threading.Timer(seconds, expire)
    clock.daemon = True
    clock.start()
    reply: Any = None
    with suppress(OSError, ValueError):  # its end of a pipe is closed, or this is no JSON
        process.stdin.write(json.dumps(message, default=str).encode() + b"\n")
        process.stdin.flush()
        reply = json.loads(process.stdout.readline(REPLY_BYTES))
    clock.cancel()
    clock.join()  # so that it kills no later exchange
    return reply if isinstance(reply, dict) else {}, late.is_set()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and to whatever it started; nothing once it was reaped.

    A child that a verifier forked may hold our pipe open after the process itself is gone, hence
    the group, and hence no look at whether the process still runs.
    """
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _fate(process: subprocess.Popen[bytes]) -> str:
    """End the process; how it ended, for the log."""
    _kill(process)
    code = process.wait()
    if code < 0:
        return f"was killed by signal {-code}"
    return f"exited with status {code}" + (" (out of memory)" if code == OUT_OF_MEMORY else "")


def _close_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.close()
