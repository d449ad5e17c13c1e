"""Samples on the terminal and the page of a run: filters, verdicts, what a browser shows of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from PIL import Image

from riskpo.cli import main
from riskpo.config import TrainConfig, resolve, to_toml
from riskpo.rewards.scorer import Scorer
from riskpo.rollout.sampler import shared_judge
from riskpo.types import Question

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
TRAP = "</script><b id='trap'>&lt; 'x' \u2028"


@pytest.fixture
def run(tmp_path):
    """The files of a run of 12 steps, as `riskpo train` writes them."""
    steps = [
        {"kind": "step", "step": s, "reward_mean": s / 12, "entropy": 1 / s, "rvar_lower": 0.1}
        for s in range(1, 13)
    ]
    held = {"avg@8": 0.25, "avg@8_low": 0.2, "avg@8_high": 0.3}
    evals = [{"kind": "eval", "step": s, **held} for s in (0, 12)]
    rows = [
        {"step": s, "question_id": f"q{i}", "prompt": f"{s}+{i}=", "gold": str(s + i),
         "response": TRAP if s == 12 else f"Seven {i}",
         "verdict": ("right", "wrong", "no_answer")[i], "reward": float(i == 0),
         "truncated": i == 1}
        for s in range(1, 13) for i in range(3)
    ]  # fmt: skip
    for name, found in (("metrics", steps + evals), ("rollouts", rows)):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "config.toml").write_text(to_toml(resolve(TrainConfig())[0]))
    (tmp_path / "notes.txt").write_text("memory plan: small\nmemory over the loaded model: 9 MiB\n")
    return tmp_path


def test_samples_are_found_by_step_text_and_verdict(run, capsys):
    def lines(*options):
        assert main(["samples", str(run), *options]) == 0
        return capsys.readouterr().out.splitlines()

    assert lines()[-1] == "20 of 36 samples; --limit 0 shows all"
    assert len(lines("--limit", "0")) == 4 * 36 + 1
    assert lines("--step", "10-12")[-1] == "9 of 9 samples"
    found = lines("--step", "3", "--text", "SEVEN 1", "--verdict", "wrong")
    assert found == [
        "step 3  wrong  reward 0, cut at the length limit  (q1)",
        "  prompt   '3+1='", "  response 'Seven 1'", "  gold     '4'", "1 of 1 samples",
    ]  # fmt: skip
    assert lines("--text", "no such")[-1] == "0 of 0 samples"
    for wrong in (["--step", "x"], ["--verdict", "maybe"], []):
        assert main(["samples", *([str(run)] if wrong else ["absent"]), *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with (run / "rollouts.jsonl").open("a") as log:
        log.write('{"step": 13, "ques')  # the run is alive
    assert lines()[-1].startswith("20 of 36")


def test_outcomes_keep_their_place_when_processes_share_the_scoring():
    """Two ranks judge a question each; both are told all four outcomes."""
    questions = [Question("a", "", "1", "arithmetic"), Question("b", "", "2", "arithmetic")]
    texts, scorer = ["1", "", "3", "2"], Scorer("exact")
    parts = [scorer.verdicts(texts[:2], questions[:1]), scorer.verdicts(texts[2:], questions[1:])]
    ranks: Any = SimpleNamespace(rank=0, size=2, gather=lambda part: parts)
    verdicts = shared_judge(scorer.verdicts, ranks)(texts, questions)
    assert [v.outcome.value for v in verdicts] == ["right", "no_answer", "wrong", "right"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page(run, tmp_path, capsys):
    """From the file alone, after its script has run; a response that is HTML stays a text."""
    assert main(["report", str(run)]) == 0
    page = run / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    shot = tmp_path / "shot.png"
    dom = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2400",
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    ).stdout  # fmt: skip
    assert "36 of 36 shown, newest first" in dom and dom.count('<td class="wrong">') == 24
    assert "<b id=" not in dom and "&lt;/script&gt;&lt;b id='trap'&gt;&amp;lt;" in dom
    for words in ("memory plan: small", "learning_rate = 0.0003", "0.250 [0.200, 0.300]"):
        assert words in dom
    assert "http://" not in page.read_text() and "https://" not in page.read_text()
    pixels = numpy.asarray(Image.open(shot))
    assert pixels.shape[:2] == (2400, 1100) and pixels[:1200].std() > 10
