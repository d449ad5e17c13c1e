"""What a library handles in silence is seen, named and counted; no verdict moves for it."""

import sys
import time

import pytest

from riskpo.rewards.pool import VerifierPool
from riskpo.rewards.scorer import MATH, MATH_WATCH
from riskpo.rewards.swallowed import swallowed
from riskpo.rewards.verdict import OUTCOMES, Outcome, Verdict, failed, metric_name, right, tally
from riskpo.rewards.worker import watched
from tests.rewards.test_rewards import FLOORS
from tests.verifiers import planted, verify_math
from tools.agreement import read_rows

LIBRARY = """
from functools import lru_cache

def deep():
    raise KeyError("deep")

def handles():  # the same exception goes through two functions
    try:
        try:
            deep()
        except KeyError as error:
            raise error
    except Exception:
        return "handled"

@lru_cache
def remembered():
    try:
        return int("nine")
    except ValueError:
        return 9

def closes():  # an unfinished generator ends in a GeneratorExit
    return any(x > 1 for x in (1, 2, 3))

def asks(other):
    return other()

def fails():
    raise OSError("not mine")
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "silent_library").mkdir()
    (tmp_path / "silent_library" / "__init__.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    import silent_library

    yield silent_library
    del sys.modules["silent_library"]


@pytest.fixture
def untraced():
    """Tests of the tracer cannot run under another one (coverage, a debugger)."""
    if sys.gettrace() is not None:
        pytest.skip("this thread is traced")


def elsewhere():
    try:
        return int("x")
    except ValueError:
        return 0


@pytest.mark.parametrize(
    "name, arguments, expected",
    [
        ("handles", (), ("handled", ("KeyError in handles",))),
        ("remembered", (), (9, ("ValueError in remembered",))),
        ("closes", (), (True, ())),
        ("asks", (elsewhere,), (0, ())),
    ],
)
def test_exceptions_that_a_package_handled(library, untraced, name, arguments, expected):
    function = getattr(library, name)
    function(*arguments)  # a cache is warm now, as it is after the first verdict
    for _ in range(2):
        assert swallowed(lambda: function(*arguments), ["silent_library"]) == expected
    assert sys.gettrace() is None


def test_what_is_raised_is_raised_and_ends_the_watch(library, untraced):
    with pytest.raises(OSError, match="not mine"):
        swallowed(library.fails, ["silent_library"])
    assert sys.gettrace() is None


def test_another_tracer_is_left_alone(library, untraced):
    def other(frame, event, arg):
        return None

    sys.settrace(other)
    try:
        assert swallowed(library.handles, ["silent_library"]) is None
        verdict = watched(verify_math, ["5", "\\boxed{6}"], MATH_WATCH)
        kept = sys.gettrace()
    finally:
        sys.settrace(None)
    assert kept is other
    assert (verdict.outcome, verdict.watched, verdict.swallowed) == (Outcome.WRONG, False, ())


def test_a_planted_exception_is_named_and_a_clean_wrong_answer_has_none(untraced):
    bad = watched(planted, ["x+y", "\\boxed{x+z}"], MATH_WATCH)
    assert bad.outcome is Outcome.WRONG
    assert bad.swallowed == ("RuntimeError in sympy_symbolic_eq",)
    clean = watched(verify_math, ["x+y", "\\boxed{x+z}"], MATH_WATCH)
    assert (clean.outcome, clean.watched, clean.swallowed) == (Outcome.WRONG, True, ())


def test_a_planted_exception_is_counted():
    items = [
        ("x+y", "\\boxed{x+z}"),
        ("x+y", "\\boxed{y+x}"),
        ("(3,1,2)", "\\boxed{(3,1,2,4)}"),
        ("5", ""),
    ]
    with VerifierPool("tests.verifiers:planted", seconds=60, watch=MATH_WATCH) as pool:
        counts = tally(pool.run(items))
    assert counts == dict.fromkeys(OUTCOMES, 0) | {
        "right": 1, "wrong": 2, "no_answer": 1, "watched": 3, "not_watched": 0, "swallowed": 1,
        "swallowed_RuntimeError": 1,
    }  # fmt: skip


def test_counts_and_the_names_under_which_they_are_logged():
    two = ("TypeError in f", "TypeError in g", "OSError in f")
    counts = tally(
        [
            Verdict(0.0, Outcome.WRONG, watched=True, swallowed=two),
            Verdict(0.0, Outcome.NO_ANSWER, watched=True, swallowed=("OSError in f",)),
            Verdict(0.0, Outcome.WRONG, watched=False),
            failed(Outcome.CRASH),
            right(),
        ]
    )
    assert {k: n for k, n in counts.items() if n} == {
        "wrong": 2, "no_answer": 1, "crash": 1, "right": 1, "watched": 2, "not_watched": 1,
        "swallowed": 2, "swallowed_TypeError": 1, "swallowed_OSError": 2,
    }  # fmt: skip
    assert metric_name("crash") == "outcome_crash"
    assert metric_name("swallowed_OSError") == "verifier_swallowed_OSError"
    assert sum(n for k, n in counts.items() if metric_name(k).startswith("outcome_")) == 5


@pytest.mark.parametrize("what", ["loop", "c_loop", "exit", "memory", "raise", "fine"])
def test_a_watch_that_fails_costs_no_verdict(what):
    """Under the watch the verifier hangs, dies, raises or says right: the first word stands."""
    with VerifierPool("tests.verifiers:hidden", workers=1, seconds=2.0, watch=["json"]) as pool:
        start = time.monotonic()
        seen = pool.run([(what,), ("print",), ("calls",)])
        taken = time.monotonic() - start
    assert [v.outcome.value for v in seen] == ["wrong", "wrong", "right"]
    assert [v.watched for v in seen[::2]] == [False, None]
    assert taken < 30  # 2 s are the limit; the rest is a replacement's start on a busy machine


def test_the_first_verdict_s_reward_and_detail_stand():
    """The same outcome twice, but another reward and detail under the watch."""
    with VerifierPool("tests.verifiers:second_thoughts", seconds=30, watch=["json"]) as pool:
        (verdict,) = pool.run([("x",)])
    assert verdict == Verdict(0.25, Outcome.WRONG, "at first", watched=True)


def test_a_slow_verdict_is_not_repeated():
    with VerifierPool("tests.verifiers:hidden", workers=1, seconds=1.9, watch=["json"]) as pool:
        late, calls = pool.run([("late",), ("calls",)])
    assert (late.outcome, late.watched) == (Outcome.WRONG, False)
    assert calls.detail == "late calls"


def test_a_package_that_cannot_be_watched_is_told_at_once():
    with pytest.raises(RuntimeError, match="no_such_package"):
        VerifierPool(MATH, watch=["no_such_package"])


def test_no_verdict_differs_with_the_watch(shared_data):
    rows = []
    for name in FLOORS:
        rows += read_rows(shared_data / "labelled_outputs" / f"{name}.jsonl", "even")[0][:30]
    items = [(str(row["gold"]), row["response"]) for row in rows]
    with VerifierPool(MATH, seconds=60) as pool:
        plain = pool.run(items)
    with VerifierPool(MATH, seconds=60, watch=MATH_WATCH) as pool:
        seen = pool.run(items)
    assert [(v.reward, v.outcome, v.detail) for v in plain] == [
        (v.reward, v.outcome, v.detail) for v in seen
    ]
    assert not tally(plain)["watched"] and tally(seen)["watched"] > len(items) / 4
