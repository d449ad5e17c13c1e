"""The predictions: sums by hand, goals, and a page that is what the command writes."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import model, model_page

ROOT = Path(__file__).resolve().parents[2]


def call(**changes):
    return dataclasses.replace(model.Call(16384, 1536, 151936, model.GPUS["H200"]), **changes)


def test_parts_by_hand():
    c = call()
    assert c.gemm == pytest.approx(2 * 16384 * 151936 * 1536 / (989e12 * 0.8) * 1e3)
    assert c.bytes(4.32e9) == pytest.approx(1.0)
    assert c.passes(1.0) == pytest.approx(16384 * 151936 / (132 * 128 * 1.98e9 * 0.75) * 1e3)
    assert 1.4 < model.padded(c) < 1.6 < model.padded(call(n=1024)) < 7
    assert model.padded(call(share=1.0)) == pytest.approx(1.0, abs=0.01)
    assert c.products(1, gathered=128) == pytest.approx(2 * c.gemm)
    assert c.products(1, gathered=64) == pytest.approx(3 * c.gemm)


def test_goals_that_are_predicted_to_be_met():
    """Flat rows are predicted above theirs."""
    for d, forward in ((1536, 1.20), (4096, 1.10)):
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
    assert text == model_page.page()
    tables = [line for line in text.splitlines() if line.startswith("| predicted |")]
    assert len(tables) == 1 + len(model_page.CASES)  # no table whose head does not say so
    assert text.count(", met") == 6 and "missed" not in text


def test_a_goal_out_of_reach_is_said_to_be_missed(monkeypatch):
    monkeypatch.setattr(model, "DENSE", 10 * model.DENSE)
    assert "flat rows 4.70, predicted 5." in model_page.page()
    assert model_page.page().count(", missed") == 2


def row(provider, median, **changes):
    sizes = {"n": 16384, "d": 1536, "v": 151936, "dtype": "bfloat16", "regime": "rl"}
    sizes |= {"zero_fraction": 0.0, "masked_fraction": 0.0, "phase": "forward"} | changes
    case = f"a case of {provider}"
    shown = {"op": "linear_logprob", "case": case, "sizes": sizes, "provider": provider}
    return shown | {"median_ms": median, "active_share": 0.01}


def test_what_was_measured_stands_beside_it(tmp_path):
    """A made-up report: of one GPU, a row each; what the model has no row for stays out."""
    told = model.total(model.ours_forward(call()))
    rows = [row("riskpo_kernels", told / 1.25), row("riskpo_kernels", None)]
    rows += [row("riskpo_kernels", 20.0, phase="forward+backward"), row("plain", 5.0)]
    rows += [row("riskpo_kernels", 5.0, masked_fraction=0.5)]
    report = {"schema": 1, "environment": {"gpu": "NVIDIA H200"}, "rows": rows}
    (tmp_path / "gpu.json").write_text(json.dumps(report), encoding="utf-8")
    cpu = {"schema": 1, "environment": {"processor": "AMD"}, "rows": rows}
    (tmp_path / "cpu.json").write_text(json.dumps(cpu), encoding="utf-8")
    found = model_page.seen(tmp_path)
    assert [x.name for x in found] == ["riskpo_kernels", "riskpo_kernels, sparse"]
    text = model_page.page(tmp_path)
    assert f"| H200 | {told / 1.25:.2f} | {told:.2f} | +25% |" in text
    assert "No number on this page was measured" not in text
    assert text.index("## Measured") < text.index("## forward")
    assert model_page.page(tmp_path / "none") == model_page.page()


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["model", "--gpu", "B200", "--n", "1024", "--no-entropy"])
    model.main()
    printed = capsys.readouterr().out
    assert printed.startswith("B200, N 1024") and "predicted ms" in printed
    monkeypatch.setattr("sys.argv", ["model", "--share", "2"])
    with pytest.raises(SystemExit):
        model.main()
