"""Commands: every mistake is one line, and most are told before anything slow is imported."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from riskpo.cli import main
from riskpo.config import ColumnsConfig, read_toml, resolve, validate
from riskpo.errors import one_line
from riskpo.eval_config import EvalConfig
from riskpo.files import check_folder
from riskpo.preflight import check_data, check_model, try_reward
from riskpo.types import Question

ROOT = Path(__file__).resolve().parents[1]
# In a fresh process in which nothing slow can be imported: a command that gets so far ends in an
# ImportError, which is not what is expected below.
LIGHT = (
    "import sys\nclass Slow:\n    def find_spec(self, name, path, target=None):\n"
    "        if name in ('torch', 'transformers', 'matplotlib'): raise ImportError(name)\n"
    "sys.meta_path.insert(0, Slow())\n"
    "from riskpo.cli import main\nfor line in sys.stdin.read().splitlines():\n"
    "    print('==', flush=True)\n"
    "    sys.stderr.write('==\\n')\n"
    "    status = main(line.split())\n    sys.stderr.write(f'status {status}\\n')\n"
)


def run_light(folder, lines):
    """[(stdout, stderr)] of commands in one process without torch, started in `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], input="\n".join(lines), capture_output=True, text=True,
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return list(zip(done.stdout.split("==\n")[1:], done.stderr.split("==\n")[1:], strict=True))


GOOD = '{"question": "q", "answer": "1"}\n'
MISTAKES = [
    ("train --config absent.toml", "config: got config='absent.toml'"),
    ("train --config broken.toml", "broken.toml, which is not TOML"),
    ("train --config latin.toml", "latin.toml, which is not TOML"),
    ("train --config .", "a file"),
    ("train --config unknown.toml", "unknown key 'lerning_rate' in unknown.toml"),
    ("train --config typed.toml", "steps='many'"),
    ("train --config", "--config: expected one argument"),
    ("train --lerning-rate 1", "--lerning-rate"),
    ("train --steps many", "'many'"),
    ("train --steps", "--steps"),
    ("train --steps -1", "steps=-1"),
    ("train --memory.optimizer disk", "invalid choice 'disk' for argument '--memory.optimizer'"),
    ("train stray", "stray"),
    ("train --model m", "data=None with model='m'"),
    ("train --model ./absent --data good.jsonl", "there is no folder ./absent"),
    ("train --model empty --data good.jsonl", "neither a config.json"),
    ("train --model good.jsonl --data good.jsonl", "there is no folder good.jsonl"),
    ("train --model m/m --data absent.jsonl", "there is no file absent.jsonl"),
    ("train --model m/m --data broken.jsonl", "broken.jsonl line 2 is not JSON"),
    ("train --model m/m --data good.tsv", "expected a file that ends in"),
    ("train --model m/m --data good.jsonl --eval-data absent.csv", "no file absent.csv"),
    ("train --model m/m --data good.jsonl --columns.question a", "columns.gold=None"),
    ("train --model m/m --data good.jsonl --difficulty prior", "columns.prior=None"),
    ("train --model m/m --data good.jsonl --columns.prior p", "columns.prior='p'"),
    (
        "train --model m/m --data good.jsonl --columns.prior p --difficulty prior",
        "columns.prior: 'p' of question",
    ),
    ("train --run-dir good.jsonl/run", "good.jsonl"),
    ("train --run-dir good.jsonl", "good.jsonl"),
    ("train --reward absent:f", "No module named 'absent'"),
    ("train --reward absent.py:f", "there is no file absent.py"),
    ("train --reward mine:absent", "mine has no 'absent'; it has length, broken"),
    ("train --reward mine.py:absent", "mine.py has no 'absent'"),
    ("train --reward mine:broken", "KeyError: 'no such thing'"),
    ("train --reward mine:N", "expected a function"),
    ("train --reward typo.py:f", "SyntaxError"),
    ("eval --samples x", "--samples"),
    ("eval --samples 0", "samples=0"),
    ("eval --questions 0", "questions=0"),
    ("eval --ks 9", "ks=[9] with samples=8"),
    ("eval --ks 1 1", "ks=[1, 1]"),
    ("eval --temperature -1", "temperature=-1.0"),
    ("eval --temperature nan", "temperature=nan"),
    ("eval --dtype float8", "invalid choice 'float8'"),
    ("eval --seeds 1 1", "seeds=[1, 1]"),
    ("eval --max-response-tokens 0", "max_response_tokens=0"),
    ("eval --out .", "is a folder"),
    ("eval --out good.jsonl/x.json", "good.jsonl"),
    ("eval --split test", "have no splits"),
    ("eval --data embedded:tiny --split test", "have no splits"),
    ("eval --data good.jsonl --split test", "split='test' with data='good.jsonl'; expected a data"),
    ("eval --model ./absent", "there is no folder ./absent"),
    ("eval --data absent.parquet", "there is no file absent.parquet"),
    ("train --algorithm grop", "Did you mean 'grpo'"),
    ("plot", "run_dir"),
    ("plot a b", "unrecognized arguments: b"),
    ("plot absent", "there is no absent/metrics.jsonl"),
    ("explain absent", "there is no absent/metrics.jsonl"),
    ("explain", "run_dir"),
    ("plan", "--model"),
    ("plan --model Qwen2.5-7B --context 0", "context=0"),
    ("plan --model Qwen2.5-7B --dtype int8", "invalid choice 'int8'"),
    ("plan --model Qwen2.5-7B --gpu huge", "--gpu 'huge'"),
    ("plan --model ./absent", "no config for model './absent'"),
    ("plan --model empty", "no config.json"),
    ("plan --model no/such-model", "Qwen2.5-1.5B, Qwen2.5-7B, Llama-3.1-8B"),
    ("doctor --against absent", "invalid choice: 'absent'"),
    ("doctor --model ./absent", "there is no folder ./absent"),
    ("doctor --report .", "is a folder"),
    ("doctor --report good.jsonl/x.md", "good.jsonl"),
    ("doctor stray", "unrecognized arguments: stray"),
    ("compare", "--algorithms"),
    ("compare --algorithms grpoo", "Did you mean 'grpo'"),
    ("compare --algorithms grpo+steps", "expected setting=value"),
    ("compare --algorithms grpo+step=3", "unknown key 'step'"),
    ("compare --algorithms grpo+steps=-1", "steps=-1"),
    ("compare --algorithms grpo --seeds 1,1", "seeds='1,1'"),
    ("compare --algorithms grpo --against dapo", "against='dapo'"),
    ("compare --algorithms grpo --jobs 0", "jobs=0"),
    ("compare --algorithms grpo --out good.jsonl", "good.jsonl"),
    ("compare absent.toml --algorithms grpo", "config: got config='absent.toml'"),
    ("compare lost.toml --algorithms grpo", "there is no folder ./absent"),
    ("trian", "no command 'trian'. Did you mean 'train'?"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    texts = {
        "good.jsonl": GOOD, "good.tsv": GOOD, "broken.jsonl": GOOD + '{"qu', "broken.toml": "a b",
        "lost.toml": 'model = "./absent"\ndata = "good.jsonl"',
        "unknown.toml": "lerning_rate = 1.0", "typed.toml": 'steps = "many"', "typo.py": "def f(:",
        "mine.py": (
            "N = 3\ndef length(text, question): return float(len(text))\n"
            "def broken(text, question): return {}['no such thing']\n"
            "def picky(text, question): return {'42': 1.0}[text]\n"
        ),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.toml").write_bytes(b'run_dir = "\xe9"')
    (folder / "empty").mkdir()
    return folder


def test_every_mistake_is_one_line_before_torch(folder):
    found = run_light(folder, [line for line, _ in MISTAKES])
    for (line, expected), (_, stderr) in zip(MISTAKES, found, strict=True):
        said, status, *more = stderr.splitlines()
        assert not more and status == "status 2", (line, stderr)
        assert said.startswith("riskpo: ") and expected in said, (line, said)


def test_the_first_line_comes_before_torch_and_so_does_the_reward(folder):
    """Then the import fails, as it is made to: one line again, with the traceback on request."""
    given = ["train --reward mine:length", "train --reward mine.py:picky", "train --debug"]
    first, second, third = run_light(folder, given[:2]) + [None]
    assert third is None
    assert first[0].startswith("riskpo train: riskpo-paper on the embedded task")
    assert "mine:length of the response '42' to question 'sample': 2" in first[0]
    assert "mine.py:picky of the response '42' to question 'sample': 1" in second[0]
    assert "of the response '' to question 'sample': crash: KeyError: ''" in second[0]
    assert "status 1" in first[1] and first[1].count("\n") == 2


def test_each_command_says_something_before_torch(folder):
    names = (
        "eval --model Qwen2.5-7B",
        "plan --model Qwen2.5-7B",
        "compare --algorithms grpo",
        "doctor",
    )
    for name, said in zip(names, run_light(folder, names), strict=True):
        assert any(text.startswith(f"riskpo {name.split()[0]}: ") for text in said), (name, said)


def test_the_first_line_of_a_run_takes_less_than_two_seconds_of_cpu_time(folder):
    """With the start of Python and what is read until then; the better of two."""
    taken = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_light(folder, ["train"])[0][0].startswith("riskpo train: ")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 2, taken


def test_the_settings_and_data_of_make_demo_llm_are_read():
    config = replace(read_toml(ROOT / "docs/demo-llm.toml"), model="SmolLM2")
    validate(resolve(config)[0])
    rows = [json.loads(row) for row in (ROOT / str(config.data)).read_text().splitlines()]
    assert len(rows) == 90 and check_data(str(ROOT / str(config.data)), config.columns)


def test_debug_shows_the_traceback(capsys):
    assert main(["train", "--steps", "-1", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["train", "--steps", "-1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "the disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file"), "the disk is full"),
        (RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "" })'), "disk is full"),
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA out of memory.\nTried to allocate"), "micro_batch_tokens"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: permission denied"),
        (IndexError("too\nmany"), "IndexError: too many. Add --debug"),
        (ValueError("a\n b"), "a b"),
        (ModuleNotFoundError("No module named 'peft'"), "pip install"),
        (KeyError(""), "KeyError"),
    ],
)
def test_what_is_said_of_an_error(error, words):
    assert words in one_line(error) and "\n" not in one_line(error)


def test_a_full_disk_is_one_line(monkeypatch, capsys, tmp_path):
    def full(config):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr("riskpo.train.train", full)
    assert main(["train", "--run-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "the disk is full" in said and said.count("\n") == 1


def test_a_reward_in_the_current_folder_by_its_console_script(folder):
    """sys.path[0] of a console script is the script's folder; ours is not on it."""
    code = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        "from riskpo.rewards.pool import VerifierPool as P\n"
        "for path in ('mine:length', 'mine.py:length'):\n"
        "    with P(path, workers=1) as pool: print(pool.run([('abc', {})])[0].reward)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["3.0", "3.0"]


def test_preflight_by_hand(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "q", "reply": "5"}) + "\n")
    columns = ColumnsConfig(question="body", gold="reply")
    assert check_data(str(tmp_path / "rows.jsonl"), columns).gold == "5"
    assert check_data("owner/name", columns) is check_data(None, columns) is None
    assert check_data("embedded:mixed", columns) is None
    check_folder(str(tmp_path / "deep" / "run"))
    check_model("owner/name"), check_model(None), check_model(f"{tmp_path}/seed-{{seed}}")
    assert try_reward("math", None, 1.0) == []
    with pytest.raises(ValueError, match="on each of 4 sample responses, .*killed after"):
        try_reward("tests.verifiers:for_ever", Question("a", "q", "5"), 0.3)


def test_eval_settings_without_ks():
    EvalConfig(samples=2).validate()
    EvalConfig(samples=2, ks=(1, 2), seeds=(3, 0), temperature=0.0).validate()
