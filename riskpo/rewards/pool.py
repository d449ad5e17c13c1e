"""Killable worker processes, the only place where untrusted text is parsed.

Each worker has its own pair of pipes and shares no lock, so a worker that is killed or stuck in C
code loses its own item alone. A thread talks to it. The calling thread keeps the clock and sends
SIGKILL at the limit (SIGALRM can be ignored, and math-verify's use of it cancels others).

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
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from riskpo.rewards.verdict import OUT_OF_MEMORY, Outcome, Verdict, failed

START_SECONDS = 120.0  # imports on a busy machine
POLL_SECONDS = 0.02  # how far past the limit a verifier may run
REPLY_BYTES = 65536
ATTEMPTS = 2
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from riskpo.rewards.worker import main; main()"
)


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
        self._workers = [_Worker(setup) for _ in range(workers)]
        self._busy = threading.Lock()
        self._threads = ThreadPoolExecutor(workers)
        self._finalizer = weakref.finalize(self, _close_all, self._workers)
        self._drive(_Worker.ensure)

    def run(self, items: Sequence[Sequence[Any]]) -> list[Verdict]:
        """One verdict per item, in order. One call at a time; others wait."""
        if not self._finalizer.alive:
            raise ValueError(
                "VerifierPool: got a closed pool; expected an open one. Make a new one."
            )
        found: dict[int, Verdict] = {}
        waiting: SimpleQueue[int] = SimpleQueue()
        for i in range(len(items)):
            waiting.put(i)

        def feed(worker: _Worker) -> None:
            with suppress(Empty):
                while True:
                    i = waiting.get_nowait()
                    found[i] = worker.judge(items[i])

        with self._busy:
            self._drive(feed)
        return [found[i] for i in range(len(items))]

    def _drive(self, job: Callable[[_Worker], object]) -> None:
        """`job` on every worker, each in a thread, while this thread keeps the clock. No process
        is left if one raises."""
        try:
            jobs = [self._threads.submit(job, worker) for worker in self._workers]
            while wait(jobs, POLL_SECONDS).not_done:
                for worker in self._workers:
                    worker.kill_if_late()
            for done in jobs:
                done.result()
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
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()  # between its thread and those that time or close it
        self._deadline = float("inf")
        self._late = False

    def judge(self, item: Sequence[Any]) -> Verdict:
        """The verdict on one item; a process that dies over it is replaced, and asked once more."""
        seconds, fate = self._setup["seconds"], ""
        for _ in range(ATTEMPTS):
            process = self.ensure()
            reply = self._exchange(process, {"arguments": list(item)}, seconds)
            with suppress(KeyError, TypeError, ValueError):  # no verdict: trust it no further
                outcome, detail = Outcome(reply["outcome"]), str(reply["detail"])
                return Verdict(float(reply["reward"]), outcome, detail)
            fate = _fate(process)
            if self._late:
                return failed(Outcome.TIMEOUT, f"killed after {seconds:g} s")
        return failed(Outcome.CRASH, f"verifier process {fate}, {ATTEMPTS} times")

    def ensure(self) -> subprocess.Popen[bytes]:
        """A live process: the present one, or a fresh one in place of a dead one.

        RuntimeError when the verifier cannot be imported.
        """
        if self._process is not None and self._process.poll() is None:
            return self._process
        process, verify = self._launch(), f"verifier {self._setup['function']}"
        reply = self._exchange(process, self._setup, START_SECONDS)
        if "ready" in reply:
            return process
        fate = f"not ready after {START_SECONDS:.0f} s" if self._late else _fate(process)
        self._stop()
        if "error" not in reply:
            raise RuntimeError(f"{verify}: its process {fate}.")
        raise RuntimeError(
            f"{verify} cannot be imported: {reply['error']}. Check the path, and that it imports "
            f"on its own in {os.getcwd()}."
        )

    def _exchange(
        self, process: subprocess.Popen[bytes], message: object, seconds: float
    ) -> dict[str, Any]:
        """The reply to a message; {} if the process died over it, or was killed for being late."""
        assert process.stdin is not None and process.stdout is not None
        with self._lock:
            self._late, self._deadline = False, time.monotonic() + seconds
        reply: Any = None
        with suppress(OSError, ValueError):  # its end of a pipe is closed, or this is no JSON
            process.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            process.stdin.flush()
            reply = json.loads(process.stdout.readline(REPLY_BYTES))
        with self._lock:
            self._deadline = float("inf")
        return reply if isinstance(reply, dict) else {}

    def kill_if_late(self) -> None:
        """Called by the thread that keeps the clock."""
        with self._lock:
            if self._process is not None and time.monotonic() > self._deadline:
                self._late, self._deadline = True, float("inf")
                _kill(self._process)

    def _launch(self) -> subprocess.Popen[bytes]:
        with self._lock:
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
        with self._lock:
            self._closed = True
            self._stop()


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
