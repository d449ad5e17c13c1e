"""The code reward: programs that solve the task pass, programs that attack the verdict do not."""

import json
import platform
from types import SimpleNamespace

import pytest

from riskpo.data.code import LEETCODE_IMPORTS, humaneval, livecodebench, mbpp, rllm
from riskpo.data.questions import load_questions
from riskpo.rewards.code import last_block, program_of, same_tokens, verify_code
from riskpo.rewards.sandbox.roles import free_names
from riskpo.rewards.sandbox.run import SandboxUnavailable
from riskpo.rewards.sandbox.wire import decode, encode
from riskpo.rewards.scorer import Outcome, Scorer
from riskpo.types import Question
from tests.isolation import CLOSED, VARIABLE, needs_sandbox, skip_or_fail
from tests.toy import scored

HUMANEVAL = {
    "task_id": "HumanEval/x",
    "prompt": 'def helper(x):\n    return x % 7\n\n\ndef f(x):\n    """Twice x."""\n',
    "entry_point": "f",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    for i in range(5):\n"
    "        assert candidate(i) == 2 * i\n        assert helper(candidate(i)) == 2 * i % 7\n",
}
CODEFORCES = {
    "problem": "Add.",
    "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5", "output": "10 "}],
}
CALLS = humaneval(HUMANEVAL)[1]
STDIN = rllm(CODEFORCES)[1]


def judge(gold, program, seconds=5.0, fenced=True):
    text = f"Here it is:\n```python\n{program}\n```\n" if fenced else program
    return verify_code(text, SimpleNamespace(gold=gold), seconds)


def outcome(gold, program, **options):
    return judge(gold, program, **options).outcome.value


@needs_sandbox
def test_right_and_wrong_programs():
    assert outcome(CALLS, "def f(x):\n    return x + x") == "right"
    assert outcome(CALLS, "    return x * 2\n", fenced=False) == "right"  # continues the prompt
    assert outcome(CALLS, "def f(x):\n    return x * x") == "wrong"
    assert outcome(CALLS, "def g(x):\n    return 2 * x") == "wrong"
    assert outcome(CALLS, "def f(x: return") == "wrong"
    assert outcome(CALLS, "def f(x):\n    while True: pass", seconds=1.0) == "timeout"
    assert outcome(CALLS, "I would rather not.", fenced=False) == "no_answer"
    assert outcome(STDIN, "print(sum(map(int, input().split())))") == "right"
    assert outcome(STDIN, "print(3)") == "wrong"
    assert outcome(STDIN, "input()\nwhile True: pass", seconds=1.0) == "timeout"
    assert verify_code(None, SimpleNamespace(gold=CALLS)).outcome is Outcome.RIGHT


SEE = "import gc, sys\n"
FORGERIES = {
    "exit": "import os\ndef f(x): os._exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "sys.exit": "import sys\ndef f(x): sys.exit(0)",
    "exit from a hook": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return None",
    "marker": 'print(\'right\'); print(\'{"outcome": "right", "detail": ""}\')\ndef f(x): pass',
    "marker on every channel": "import os\nfor i in range(64):\n    try:\n        os.write(i, "
    'b\'{"outcome": "right", "detail": ""}\\n\')\n    except OSError:\n        pass\ndef f(x): 0',
    "equal to all": "class E(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n"
    "def f(x): return E(99)",
    "object equal to all": "class E:\n    def __eq__(s, o): return True\n"
    "    def __mod__(s, o): return s\n    __bool__ = __eq__\ndef f(x): return E()",
    "equality that exits": "import os\nclass E:\n    def __eq__(s, o): os._exit(0)\n"
    "def f(x): return E()",
    "equality that stops": "class E:\n    def __eq__(s, o): raise StopIteration\n"
    "def f(x): return E()",
    "stop iteration": "def f(x): raise StopIteration",
    "generator exit": "def f(x): raise GeneratorExit",
    "keyboard interrupt": "def f(x): raise KeyboardInterrupt",
    "helper replaced": "def helper(x): return 0\ndef f(x): return 7",
    "check replaced": "def check(c): pass\ndef f(x): return 0",
    "builtins replaced": "import builtins\nbuiltins.AssertionError = ValueError\n"
    "builtins.range = lambda *a: []\nbuiltins.exec = print\nbuiltins.compile = print\n"
    "def f(x): return 0",
    "json replaced": 'import json\njson.dumps = lambda *a, **k: \'{"outcome": "right"}\'\n'
    "def f(x): return 0",
    "frames": SEE + "def f(x):\n    g = sys._getframe()\n    while g:\n        for d in "
    "(g.f_globals, g.f_locals):\n            d.update(outcome='right', check=print)\n"
    "        g = g.f_back\n    return 0",
    "memory": SEE + "def f(x):\n    for o in gc.get_objects():\n        if isinstance(o, dict):\n"
    "            if 'tests' in o or 'expected' in o: return o\n    return 0",
    "trace": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\n"
    "def f(x): return 0",
    "kill the parent": "import os, signal\ndef f(x):\n    for p in (os.getppid(), 0, -1, 1):\n"
    "        try: os.kill(p, signal.SIGKILL)\n        except OSError: pass\n    return 0",
    "alarm": "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nsignal.alarm(0)\n"
    "def f(x): return 0",
    "reply by hand": "import os\ndef f(x):\n    for i in range(3, 64):\n        try: os.write(i, "
    'b\'{"value": ["object", 0]}\\n\' * 9)\n        except OSError: pass\n    return 0',
    "not JSON": "import os\ndef f(x):\n    for i in range(3, 64):\n        try: os.write(i, "
    "b'\\xff\\n')\n        except OSError: pass\n    return 0",
    "not a number": "def f(x): return float('nan')",
    "huge number": "import sys\nsys.set_int_max_str_digits(0) if hasattr(sys, "
    "'set_int_max_str_digits') else 0\ndef f(x): return 10 ** 20_000_000",
    "huge list": "def f(x): return [0] * 10**7",
    "deep list": "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "memory hog": "def f(x): return len(bytearray(2**34))",
    "fork": "import os\ndef f(x):\n    os.fork()\n    return 0",
    "numberless class": "def f(x): return int",
}


@needs_sandbox
@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_passes(name):
    verdict = judge(CALLS, FORGERIES[name])
    assert verdict.outcome in (Outcome.WRONG, Outcome.TIMEOUT), verdict
    assert verdict.reward == 0


@needs_sandbox
def test_forgeries_are_answers_of_the_program_not_faults_of_the_judge():
    """The same harness lets a right program through, whatever it prints or registers."""
    loud = "import atexit, os\natexit.register(os._exit, 1)\nprint('wrong')\ndef f(x): return 2 * x"
    assert outcome(CALLS, loud) == "right"


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "import os; os.write(1, b'3 10'); os._exit(0)",
        "print(open('/proc/self/fd/3').read())",
        "import glob\nfor p in glob.glob('/**', recursive=True):\n    if 'test' in p: 0",
        "print('3\\n10')",
        "import sys; sys.exit(0)",
    ],
)
def test_no_forgery_of_output_passes(program):
    assert outcome(STDIN, program) in ("wrong", "timeout")


@needs_sandbox
@pytest.mark.parametrize(
    "tests, program, expected",
    [
        (
            "assert math.isclose(f(), 2)",
            "def f(): return 3\nclass math: isclose = lambda *a: 1",
            "wrong",
        ),
        (
            "assert all(map(lambda i: f(i) == i, range(3)))",
            "def f(i): raise StopIteration",
            "wrong",
        ),
        (
            "try:\n    f()\nexcept ValueError:\n    pass\nelse:\n    assert 0",
            "def f(): int('x')",
            "right",
        ),
        (
            "try:\n    f()\nexcept Exception:\n    pass\nassert True",
            "import os\ndef f(): os._exit(0)",
            "wrong",
        ),
        (
            "assert f([P(1), P(2)]) == 3",
            "class P:\n    def __init__(s, v): s.v = v\ndef f(ps): return sum(p.v for p in ps)",
            "right",
        ),
        ("assert list(f()) == [0, 1]", "def f(): yield from range(2)", "right"),
        ("assert f() == [0, 1]", "def f(): yield from range(2)", "wrong"),
        (
            "assert f(int, {1: (2,)}) is True",
            "def f(t, d): return d == {1: (2,)} and t is int",
            "right",
        ),
        ("assert f() != 3", "def f(): return object()", "wrong"),
        ("assert f(len) == 3", "def f(g): return 3", "unparsable_gold"),
        ("assert 1 == 1", "def f(): return 3", "unparsable_gold"),
        ("assert f( == 1", "def f(): return 1", "unparsable_gold"),
        ("x = f()", "def f(): return 1", "unparsable_gold"),
    ],
)
def test_what_tests_may_do_and_what_counts(tests, program, expected):
    gold = json.dumps({"kind": "calls", "tests": tests, "helpers": "", "entries": []})
    assert outcome(gold, program) == expected


def test_a_gold_without_tests_is_told():
    for gold in ("", "5", "{}", '{"kind": "calls", "tests": ""}', '{"kind": "x", "tests": "y"}'):
        assert outcome(gold, "x = 1") == "unparsable_gold"
    plain = json.dumps({"kind": "calls", "tests": "x = f()"})
    assert verify_code(None, SimpleNamespace(gold=plain)).outcome is Outcome.UNPARSABLE_GOLD


@pytest.mark.parametrize(
    "response, block",
    [
        ("```python\na = 1\n```\nthen\n```python\na = 2\n```", "a = 2\n"),
        ("```python\na = 1\n```\n```\noutput\n```", "a = 1\n"),
        ("```py\na = 1\n```\n```cpp\nint a;\n```", "a = 1\n"),
        ("```\na = 1\n```", "a = 1\n"),
        ("```cpp\nint a;\n```", None),
        ("```python\na = 1\n", None),
        ("<think>```python\na = 1\n```</think> none", None),
        ("a = 1", None),
        ("```python\r\na = 1\r\n```", "a = 1\r\n"),
    ],
)
def test_which_block_is_the_program(response, block):
    assert last_block(response) == block


def test_what_is_no_program():
    task = {"kind": "stdin"}
    for response in ("", "yes", "42", "```python\nx = 1\n", "It prints 3.", "```cpp\nint x;\n```"):
        assert program_of(response, task) is None
    assert program_of("print(1)", task).strip() == "print(1)"
    assert same_tokens("1  2\n", "1 2") and not same_tokens("12", "1 2")
    assert not same_tokens("YES", "Yes")


def test_values_travel_unchanged():
    values = [None, True, 3, -(10**50), 0.1, float("inf"), 1j, "x\n", b"\x00", (1, [2]), {1: {2}},
              frozenset({3}), {"a": (None,)}, int, dict]  # fmt: skip
    data = json.loads(json.dumps(encode(values, refer=lambda v: 0)))
    back = decode(data, resolve=lambda i: i)
    assert back == values and [type(v) for v in back] == [type(v) for v in values]
    with pytest.raises(RecursionError):
        deep = []
        for _ in range(300):
            deep = [deep]
        encode(deep, refer=lambda v: 0)
    for bad in (["eval", "1"], [], ["int", "x"], ["str", 5], ["plain", 5], ["type", "open"]):
        with pytest.raises((ValueError, IndexError, KeyError)):
            decode(bad, resolve=lambda i: i)


def test_free_names():
    assert free_names("import re\ndef check(c):\n    x = [y for y in f(c)]\nassert g(x)") == {
        "f", "g", "x"} - {"x"}  # fmt: skip


def test_forms_of_rows():
    assert "reference" in json.loads(mbpp({"text": "t", "test_list": ["assert f(1)"]})[1])
    prompt, gold = mbpp(
        {"text": "t", "code": "a\r\nb", "test_list": ["assert f(1)", "assert f(2)"]}
    )
    assert json.loads(gold)["reference"] == "a\nb" and "f(2)" not in prompt and "f(1)" in prompt
    row = {
        "question_content": "q",
        "starter_code": "class Solution: ...",
        "public_test_cases": json.dumps(
            [{"input": "[1, 2]\n3", "output": "true", "testtype": "functional"}]
        ),
        "metadata": '{"func_name": "has"}',
    }
    task = json.loads(livecodebench(row)[1])
    assert "Solution().has([1, 2], 3)" in task["tests"] and task["before"] == LEETCODE_IMPORTS
    if not CLOSED:
        solution = "class Solution:\n    def has(self, a, n): return sum(a) == n"
        assert outcome(json.dumps(task), solution) == "right"
    with pytest.raises(ValueError, match="'functional'"):
        rllm({"problem": "p", "tests": {"x": 1}})


def test_packed_hidden_tests_hold_text_or_are_refused():
    import base64
    import os
    import pickle
    import zlib

    def packed(value):
        return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()

    case = json.dumps([{"input": "1", "output": "1", "testtype": "stdin"}])
    row = {"question_content": "q", "public_test_cases": "[]", "private_test_cases": packed(case)}
    assert len(json.loads(livecodebench(row)[1])["tests"]) == 1
    with pytest.raises(ValueError, match="expected a text"):
        livecodebench({**row, "private_test_cases": packed(os.system)})


@needs_sandbox
def test_the_scorer_counts_programs_by_the_same_names(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(HUMANEVAL) + "\n" + json.dumps(CODEFORCES) + "\n")
    functions, streams = load_questions(str(path), instruction="in \\boxed{}")
    assert functions.meta["reward"] == "code" and "boxed" not in functions.prompt
    number = Question("n", "1+1", "2", "gsm8k")
    texts = ["```python\ndef f(x): return 2 * x\n```", "```python\nprint(1)\n```", "\\boxed{2}"]
    with Scorer(workers=1, seconds=5) as scorer:
        rewards, counts = scored(scorer, texts, [functions, streams, number])
        assert rewards == [1, 0, 1]
        assert (counts["right"], counts["wrong"], sum(counts.values())) == (2, 1, 3)
        assert scorer.check_golds([functions, streams, number]) == []


@pytest.mark.skipif(platform.system() == "Linux" and not CLOSED, reason="isolation works here")
def test_a_machine_without_isolation_is_refused_at_the_door():
    with pytest.raises(SandboxUnavailable, match="code-limits-only"):
        Scorer("code")


def test_without_isolation_tests_skip_or_fail_as_asked(monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    skip_or_fail("")
    with pytest.raises(pytest.fail.Exception, match="is set, but: no namespaces"):
        skip_or_fail("no namespaces")
    monkeypatch.setenv(VARIABLE, "0")
    with pytest.raises(pytest.skip.Exception, match="no namespaces"):
        skip_or_fail("no namespaces")
