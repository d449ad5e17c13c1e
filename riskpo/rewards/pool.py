"""Killable worker processes, the only place where untrusted text is parsed.

Each worker has its own pair of pipes and shares no lock, so a worker that is killed or stuck in C
code loses its own item alone. One thread per worker feeds it. The calling thread keeps the clock
and sends SIGKILL at the limit (SIGALRM can be ignored, and math-verify's use of it cancels others).

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


class _Worker:
    """One process and its clock. `ask` runs in a feeding thread, `kill_if_late` in the caller."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup = setup
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self.late = False

    def launch(self) -> None:
        """Start a process without waiting for it."""
        with self._lock:
            if self._closed:
                raise RuntimeError("VerifierPool: closed while it was working.")
            self._process = subprocess.Popen(
                # A console script does not look into the current folder, where a reward may be.
                [sys.executable, "-c", BOOT, json.dumps([*sys.path, os.getcwd()])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # so that what a verifier started dies with it
            )

    def ready(self) -> None:
        """Wait for the imports; RuntimeError when the verifier cannot be imported."""
        reply = self._exchange(self._setup, START_SECONDS)
        if reply is None:
            fate = f"not ready after {START_SECONDS:.0f} s" if self.late else self.fate()
            self.stop()
            raise RuntimeError(f"verifier {self._setup['function']}: its process {fate}.")
        if "error" in reply:
            self.stop()
            raise RuntimeError(
                f"verifier {self._setup['function']} cannot be imported: {reply['error']}. "
                f"Check the path, and that it imports on its own in {os.getcwd()}."
            )

    def ensure(self) -> None:
        """A live process: the present one, or a fresh one in place of a dead one."""
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self.launch()
            self.ready()

    def ask(self, arguments: Sequence[Any]) -> Verdict | None:
        """The verdict on one item, or None when the process died or was killed over it."""
        reply = self._exchange({"arguments": list(arguments)}, self._setup["seconds"])
        try:
            if reply is None:
                return None
            return Verdict(float(reply["reward"]), Outcome(reply["outcome"]), str(reply["detail"]))
        except (KeyError, TypeError, ValueError):
            self.kill()  # not our protocol: do not trust this process any further
            return None

    def _exchange(self, message: object, seconds: float) -> dict[str, Any] | None:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with self._lock:
            self.late, self._deadline = False, time.monotonic() + seconds
        try:
            process.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline(REPLY_BYTES)
            reply = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, json.JSONDecodeError):
            reply = None
        finally:
            with self._lock:
                self._deadline = None
        return reply if isinstance(reply, dict) else None

    def kill_if_late(self) -> None:
        with self._lock:
            if self._deadline is not None and time.monotonic() > self._deadline:
                self.late, self._deadline = True, None
                self.kill()

    def kill(self) -> None:
        """SIGKILL to the process and to whatever it started; nothing once it was reaped.

        A child that a verifier forked may hold our pipe open after the process itself is gone,
        hence the group, and hence no look at whether the process still runs.
        """
        if self._process is None or self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def fate(self) -> str:
        """How the dead process ended, for the log."""
        assert self._process is not None
        self.kill()
        code = self._process.wait()
        if code < 0:
            return f"was killed by signal {-code}"
        return f"exited with status {code}" + (" (out of memory)" if code == OUT_OF_MEMORY else "")

    def stop(self) -> None:
        """End the process, reap it, close its pipes. Idempotent."""
        process = self._process
        if process is None:
            return
        self.kill()
        process.wait()
        self._process = None
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # unsent bytes of a dead worker
                if pipe is not None:
                    pipe.close()

    def close(self) -> None:
        """Stop for good: a feeding thread that is still at work starts no new process."""
        with self._lock:
            self._closed = True
        self.stop()


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
        self.seconds = seconds
        self._workers = [_Worker(setup) for _ in range(workers)]
        self._busy = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)
        try:
            for worker in self._workers:
                worker.launch()
            self._drive(_Worker.ready)
        except BaseException:
            self.close()
            raise

    def run(self, items: Sequence[Sequence[Any]]) -> list[Verdict]:
        """One verdict per item, in order. One call at a time; others wait."""
        verdicts: list[Verdict | None] = [None] * len(items)
        queue = iter(range(len(items)))
        queue_lock = threading.Lock()

        def feed(worker: _Worker) -> None:
            while True:
                with queue_lock:
                    index = next(queue, None)
                if index is None:
                    return
                verdicts[index] = self._judge(worker, items[index])

        if not self._finalizer.alive:
            raise ValueError(
                "VerifierPool: got a closed pool; expected an open one. Make a new one."
            )
        with self._busy:
            self._drive(feed)
        return [v for v in verdicts if v is not None]

    def _judge(self, worker: _Worker, item: Sequence[Any]) -> Verdict:
        fate = ""
        for _ in range(ATTEMPTS):
            worker.ensure()
            verdict = worker.ask(item)
            if verdict is not None:
                return verdict
            if worker.late:
                return failed(Outcome.TIMEOUT, f"killed after {self.seconds:g} s")
            fate = worker.fate()
        return failed(Outcome.CRASH, f"verifier process {fate}, {ATTEMPTS} times")

    def _drive(self, job: Callable[[_Worker], None]) -> None:
        """Run `job` on every worker, each in a thread, while this thread keeps the clock."""
        threads = ThreadPoolExecutor(len(self._workers))
        jobs = [threads.submit(job, worker) for worker in self._workers]
        threads.shutdown(wait=False)  # when they are done
        try:
            while wait(jobs, POLL_SECONDS).not_done:
                for worker in self._workers:
                    worker.kill_if_late()
        except BaseException:  # Ctrl-C: leave no process behind
            self.close()
            raise
        for done in jobs:
            done.result()

    def close(self) -> None:
        """Kill and reap every worker; the pool cannot be used afterwards."""
        self._finalizer()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.close()
