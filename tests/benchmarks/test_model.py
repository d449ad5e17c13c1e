"""The predictions: sums by hand, goals, and a page that is what the command writes."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import model

ROOT = Path(__file__).resolve().parents[2]


def call(**changes):
    return dataclasses.replace(model.Call(16384, 1536, 151936, model.GPUS["H200"]), **changes)


def test_parts_by_hand():
    c = call()
    assert c.gemm == pytest.approx(2 * 16384 * 151936 * 1536 / (989e12 * 0.8) * 1e3)
    assert c.bytes(4.32e9) == pytest.approx(1.0)
    assert c.passes(1.0) == pytest.approx(16384 * 151936 / (132 * 128 * 1.98e9 * 0.75) * 1e3)
    assert model.padded(16384) == pytest.approx(1.05, abs=0.01)
    assert model.padded(1024) == pytest.approx(2.14, abs=0.06)


def test_goals_that_are_predicted_to_be_met():
    """The forward at D 1536 is predicted a thousandth above its goal, flat rows above theirs."""
    for d, forward in ((1536, 1.21), (4096, 1.10)):
        c = call(d=d)
        assert model.total(model.ours_forward(c)) / c.gemm < forward
        assert model.total(model.BOTH["riskpo_kernels, sparse"](c)) / c.gemm < 1.5


def test_more_work_takes_longer():
    for name, parts in model.BOTH.items():
        least = model.total(parts(call()))
        for bigger in ({"n": 32768}, {"d": 2048}, {"v": 262144}):
            assert model.total(parts(call(**bigger))) > least, (name, bigger)
        assert model.total(parts(call(gpu=model.GPUS["A100"]))) > least, name
        assert all(ms >= 0 for ms in parts(call()).values()), name
    sparse = [model.total(model.ours_sparse(call(share=s))) for s in (0.0, 0.01, 0.1, 1.0)]
    assert sparse == sorted(set(sparse))


def test_the_page_is_what_the_command_writes():
    text = (ROOT / "docs" / "predicted.md").read_text(encoding="utf-8")
    assert text == model.page()
    tables = [line for line in text.splitlines() if line.startswith("| predicted |")]
    assert len(tables) == 1 + len(model.CASES)  # no table whose head does not say so
    assert "missed" in text and "met" in text


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["model", "--gpu", "B200", "--n", "1024", "--no-entropy"])
    model.main()
    printed = capsys.readouterr().out
    assert printed.startswith("B200, N 1024") and "predicted ms" in printed
    monkeypatch.setattr("sys.argv", ["model", "--share", "2"])
    with pytest.raises(SystemExit):
        model.main()
