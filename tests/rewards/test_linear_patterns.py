"""Text of any shape is read in linear time: every pattern of riskpo, and whole answers."""

import importlib
import multiprocessing
import re
import time
from pathlib import Path

import pytest

from riskpo.rewards.answers.final import boxes, extract
from riskpo.rewards.math import verify_math

SIZE = 300_000
CPU_SECONDS = 2.0  # of one scan; a linear one takes some tens of milliseconds
CHARACTERS = "0 \n\tA.:,;#*$\\({)}]^_-+/=%<\"'`~!axé\u00b2\u221a\u200b"
LOOPS = (
    "1 ", "1,", "1.", ".1", "a ", "a.", "A:", "A:\n", "*A", "answer", "answer ", "answer:\n",
    "answer is ", '"answer":', '"answer":"', '"answer":"\\', "####", "#### ", "####\n", "\\boxed{",
    "\\boxed{1}", "\\boxed{1}, ", "\\boxed ", "\\fbox{", "<think>", "</think>", "<th", "\\text{",
    "\\text {", "\\frac{", "\\frac1", "1\\,", "1{,}", "0.(", "0.\\dot", "1e", "1/", "1:", "1_",
    "^{", "\\sin^{", "\\overline{", "```\n", "```", "``` \n", "x<1 or ", "\\pm ", "\u221a(",
    "\u00b2x", "- ",
)  # fmt: skip


def patterns():
    """(name, pattern) of every reward module: they alone read responses."""
    root = Path(__file__).resolve().parents[2]
    for path in sorted((root / "riskpo" / "rewards").rglob("*.py")):
        if "re.compile(" not in path.read_text(encoding="utf-8"):
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for name, value in vars(importlib.import_module(module)).items():
            for pattern in value if isinstance(value, tuple) else (value,):
                if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
                    yield f"{module}.{name}", pattern


def texts(size):
    for unit in (*CHARACTERS, *LOOPS):
        yield unit, (unit * (size // len(unit) + 1))[:size]


def slow(scan, size=SIZE):
    """The texts on which a scan takes too long, each with its CPU time."""
    limit = CPU_SECONDS * size / SIZE
    taken = {unit: seconds(scan, text, limit=limit) for unit, text in texts(size)}
    return {unit: taken[unit] for unit in taken if taken[unit] > limit}


def seconds(run, *arguments, limit=CPU_SECONDS):
    """CPU time of a call: the least of three, since a collection of garbage is no fault of it."""
    least = float("inf")
    for _ in range(3):
        start = time.process_time()
        run(*arguments)
        least = min(least, time.process_time() - start)
        if least <= limit:
            break
    return least


def in_a_process(target, *arguments, seconds):
    """Ends what does not end: the scan of a pattern holds the interpreter."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(seconds)
    alive = process.is_alive()
    process.kill()
    process.join()
    return not alive and process.exitcode == 0


def scan_all(names):
    for name, pattern in patterns():
        if name in names:
            found = slow(lambda text, p=pattern: [None for _ in p.finditer(text)], SIZE // 10)
            assert not found, (name, found)


def test_every_pattern_is_linear():
    names = sorted({name for name, _ in patterns()})
    assert len(names) > 30
    assert in_a_process(scan_all, names, seconds=240)


def test_a_planted_quadratic_pattern_is_found():
    planted = re.compile(r"\s+$")
    unit = " " * 10_000 + "x"
    start = time.process_time()
    planted.search(unit)
    assert time.process_time() - start > CPU_SECONDS / 900  # at 300 kB it is 900 times as much


@pytest.mark.parametrize("scan", [extract, boxes])
def test_whole_responses_are_read_in_linear_time(scan):
    assert not slow(scan, SIZE // 5)


@pytest.mark.parametrize("answer", ["Answer: 5", "\\boxed{5}", "#### 5", '{"answer": "5"}', "5"])
@pytest.mark.parametrize("tail", ["\n", " \n", "\u00a0\n"])
def test_a_long_tail_of_blanks_costs_neither_time_nor_the_answer(answer, tail):
    text = answer + tail * (SIZE // len(tail))
    assert verify_math("5", text).outcome.value == "right"
    assert seconds(verify_math, "5", text) < CPU_SECONDS


@pytest.mark.parametrize("unit", [" ", "\n", "7", "\\boxed{", "$", "{", "\u221a", '"answer":'])
def test_a_whole_verdict_on_300_kilobytes(unit):
    assert seconds(verify_math, "5", unit * (SIZE // len(unit))) < CPU_SECONDS


@pytest.mark.parametrize("unit", ["(", "{", "x<1 or ", "$", "1,", "\\frac{", " "])
def test_the_longest_answer_costs_its_parser_little(unit):
    taken = seconds(verify_math, "5", f"Answer: {unit * (990 // len(unit))}")
    assert taken < 2 * CPU_SECONDS  # brackets alone took 6 s
