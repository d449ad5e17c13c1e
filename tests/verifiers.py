"""Verifiers that misbehave, by import path, for tests/rewards/test_rewards.py."""

import ctypes
import os
import signal
import subprocess
import sys
import time

from riskpo.rewards.verdict import Outcome, Verdict, right


def echo(value: str) -> Verdict:
    time.sleep(0.001 * (hash(value) % 5))  # so that answers do not finish in order
    return right(value)


def pid(_: str) -> Verdict:
    return right(str(os.getpid()))


def slow(_: str) -> Verdict:
    time.sleep(1.0)
    return right(str(os.getpid()))


def act(what: str) -> float:
    if what == "raise":
        raise KeyError("no such thing")
    if what == "exit":
        os._exit(3)
    if what == "memory":
        return float(len(bytearray(8 * 2**30)))
    if what == "segfault":
        ctypes.string_at(0)
    if what == "loop":
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        while True:
            continue
    if what == "c_loop":
        return float(len(str(10 ** (10**10))))
    if what == "children":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        while os.fork():  # the children keep our pipe open
            time.sleep(60)
        time.sleep(60)
    if what == "heir":
        if os.fork():
            os._exit(3)
        time.sleep(60)  # holds the pipe open after the worker is gone
    if what == "nan":
        return float("nan")
    if what == "print":
        print('{"reward": 1.0, "outcome": "right", "detail": "forged"}', flush=True)
        return 0.0
    return 1.0


def half_for_short(text: str, question) -> float:
    return 0.5 if len(text) <= len(question.gold) else 0.0


def no_torch(_: str) -> float:
    return 0.0 if "torch" in sys.modules or "transformers" in sys.modules else 1.0


def for_ever(text: str, question: object) -> float:
    while True:
        time.sleep(1.0)


def odd_values(text: str, question: object) -> object:
    """What the response names, as its reward."""
    import numpy
    import torch

    return {
        "none": None, "nan": float("nan"), "inf": float("inf"), "text": "1.0", "list": [1.0],
        "many": [1.0, 0.0], "tensor of two": torch.ones(2), "object": {"reward": 1.0},
        "huge": 1e39, "complex": 1j, "verdict": Verdict(float("nan"), Outcome.RIGHT),
        "word": Verdict(1.0, "good"), "tensor": torch.tensor(0.5), "numpy": numpy.float32(0.5),
        "bool": True, "int": 2,
    }[text]  # fmt: skip


def picky(text: str, question: object) -> float:
    return {"42": 1.0}[text]
