"""A verifier process, which reads untrusted text: one JSON line in, one JSON line out.

riskpo/rewards/pool.py starts it with `python -c`: a child of multiprocessing would import the
parent's main module, and with it torch. Messages are JSON, not pickle, so a compromised worker can
give wrong rewards but cannot run code in the trainer. Imports stay light: a worker starts in about
a second and takes about 100 MiB.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import numbers
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, Any

import psutil

from riskpo.rewards.verdict import OUT_OF_MEMORY, Outcome, Verdict, failed

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

DETAIL_CHARACTERS = 300
CPU_SECONDS_SLACK = 5


def load_function(path: str) -> Callable[..., Any]:
    """The callable named "package.module:function" or "folder/file.py:function"."""
    where, _, name = path.rpartition(":")
    if not where or not name:
        raise ValueError(
            f"got {path!r}; expected package.module:function or file.py:function. Write where the "
            "function is"
        )
    module = _module_of(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    if not hasattr(module, name):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise ValueError(f"{where} has no {name!r}; it has {', '.join(known) or 'no function'}")
    found = getattr(module, name)
    if not callable(found):
        raise ValueError(f"{path} is a {type(found).__name__}; expected a function")
    return found  # type: ignore[no-any-return]


def _module_of(file: Path) -> ModuleType:
    """A file as a module, whose neighbours it can import."""
    if not file.is_file():
        raise ValueError(f"there is no file {file} in {Path.cwd()}")
    sys.path.append(str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"riskpo_reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


LARGEST = 3.4028234663852886e38  # of float32, in which rewards are kept


def to_verdict(value: object) -> Verdict:
    """What a verifier returned as a Verdict; a plain number is right above zero.

    TypeError or ValueError for anything but one finite number: text, None, a list of rewards.
    """
    given = value.reward if isinstance(value, Verdict) else value
    if getattr(given, "shape", None) == ():  # a number of numpy's or torch's
        given = given.item()  # type: ignore[attr-defined]
    if not isinstance(given, numbers.Real):
        kind = type(given).__name__
        raise TypeError(
            f"the reward function returned {given!r:.60} of type {kind}; expected one finite number"
        )
    reward = float(given)
    if not abs(reward) <= LARGEST:
        raise ValueError(f"the reward function returned {reward}; expected one finite number")
    if isinstance(value, Verdict):
        return replace(value, reward=reward, outcome=Outcome(value.outcome))
    return Verdict(reward, Outcome.RIGHT if reward > 0 else Outcome.WRONG)


def limit_memory(mebibytes: int) -> None:
    """Let answers take this much more address space, where the system can limit it.

    What is mapped by now is the verifier's own: PyTorch built for CUDA alone maps gigabytes.
    """
    if resource is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = psutil.Process().memory_info().vms + mebibytes * 2**20
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with suppress(ValueError, OSError):  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def limit_cpu(seconds: float) -> None:
    """Let the kernel end this process even if the trainer is gone and nobody watches the clock."""
    if resource is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(time.process_time() + seconds) + CPU_SECONDS_SLACK
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def answer(function: Callable[..., Any], arguments: list[Any]) -> Verdict:
    """One call; every exception becomes a `crash` verdict that names it."""
    arguments = [SimpleNamespace(**a) if isinstance(a, dict) else a for a in arguments]
    try:
        return to_verdict(function(*arguments))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # the heap is in an unknown state: let a fresh worker go on
    except Exception as error:
        return failed(Outcome.CRASH, f"{type(error).__name__}: {error}")


def _send(channel: IO[bytes], **message: object) -> None:
    channel.write(json.dumps(message).encode() + b"\n")
    channel.flush()


def main() -> None:
    """Read the set-up line, import the verifier, then answer until the input ends."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a verifier prints must not look like an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    setup = json.loads(incoming.readline())
    try:
        function = load_function(setup["function"])
    except BaseException as error:  # a script may end itself, or read our arguments
        _send(outgoing, error=f"{type(error).__name__}: {error}"[:4000])
        sys.exit(1)
    limit_memory(setup["memory_mib"])
    _send(outgoing, ready=True)
    for line in incoming:
        limit_cpu(setup["seconds"])
        verdict = answer(function, json.loads(line)["arguments"])
        _send(outgoing, **asdict(replace(verdict, detail=verdict.detail[:DETAIL_CHARACTERS])))
