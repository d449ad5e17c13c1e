"""riskpo doctor: it finds planted faults, agrees with what is right, and writes what it saw."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest

from riskpo.cli import main
from riskpo.doctor import machine, own_model, report
from riskpo.doctor.check import Check
from riskpo.doctor.libraries import LIBRARIES, Op, ops, plain_op, riskpo_op
from riskpo.doctor.loss_traps import LOSS_TRAPS, pose_loss
from riskpo.doctor.problem import make_problem, ours, plain
from riskpo.doctor.report import against
from riskpo.doctor.traps import TRAPS, pose
from riskpo_kernels import linear_logprob
from tests.toy import save_byte_model

OURS = Op("ours", "riskpo", riskpo_op("torch"))
BY_NAME = {trap.name: trap for trap in TRAPS}


@pytest.mark.parametrize("bias", [False, True])
def test_the_problem_fills_both_clip_branches(bias):
    problem = make_problem(bias=bias)
    new = ours(problem, backend="torch")["logprob"]
    old, sign = problem.old_logprob[problem.mask], problem.advantage[:, None].expand(6, 12)
    ratio, sign = (new - old).exp(), sign[problem.mask]
    assert ((ratio > 1.2) & (sign > 0)).any() and ((ratio < 0.8) & (sign < 0)).any()
    assert ((ratio < 1.2) & (ratio > 0.8)).sum() > 10


@pytest.mark.parametrize("trap", TRAPS, ids=lambda t: t.name)
def test_our_op_holds_in_every_trap(trap):
    assert pose(trap, OURS).ok, str(pose(trap, OURS))


@pytest.mark.parametrize("trap", LOSS_TRAPS, ids=lambda t: t.name)
def test_our_loss_holds_in_every_trap(trap):
    assert pose_loss(trap, lambda p: ours(p, backend="torch")).ok


def faulty(change):
    """An op that is right but for `change(logprob, entropy)`."""

    def call(h, w, t, temperature):
        logprob, entropy = riskpo_op("torch")(h, w, t, temperature)
        return change(logprob, entropy)

    return Op("faulty", "riskpo", call)


@pytest.mark.parametrize(
    "name, change",
    [
        ("logprob <= 0, entropy >= 0 (bf16)", lambda x, e: (x + 1e-3, e)),
        ("gradient of the entropy", lambda x, e: (x, e.detach() + 0 * x)),
        ("bf16 log-prob, largest error", lambda x, e: (x.bfloat16(), e)),
        ("V odd, not a multiple of any tile", lambda x, e: (x * 1.0001, e)),
        ("target -100 on a NaN row", lambda x, e: (x + 1.0, e)),
        ("rows without an upstream gradient", lambda x, e: (x + e.sum(), e)),
        ("a row alone and in a batch", lambda x, e: (x + 1e-4 * len(x), e)),
    ],
)
def test_a_planted_fault_is_seen(name, change):
    assert pose(BY_NAME[name], faulty(change)).ok is False


def test_plain_pytorch_cancels_near_certain_targets():
    """The trap is real: log-softmax in float32 loses 1 - p, which the op keeps."""
    seen = pose(BY_NAME["p(target) up to 1 - 1e-6"], Op("plain", "torch", plain_op))
    assert seen.ok is False and ">" in seen.text


def test_what_is_not_offered_or_raises_is_no_failure():
    op = Op("none", "torch", lambda *_: 1 / 0, entropy=False, temperature=False)
    assert pose(BY_NAME["gradient of the entropy"], op).text == "not offered"
    seen = pose(BY_NAME["frozen head"], op)
    assert seen.ok is None and "ZeroDivisionError" in seen.text


def test_a_loss_that_reads_behind_the_mask_is_seen():
    trap = next(t for t in LOSS_TRAPS if t.name == "NaN old log-probs behind the mask")
    assert pose_loss(trap, plain).ok is False


@pytest.mark.parametrize("name", ["plain", "torch", "trl", "liger", "verl"])
def test_against_an_installed_library(name):
    small = make_problem(batch=2, tokens=4, width=16, vocab=32)
    library, note = LIBRARIES[name]
    if not report.installed(lambda: library(small)):
        pytest.skip(f"{name} or a part of it is not installed")
    rows = against(name)
    assert note and {r.dtype for r in rows} == {"fp32", "bf16"}
    for row in rows:
        assert "ours" not in row.verdict, row
        if row.dtype == "fp32":  # another float32 program of the same mathematics
            assert row.difference < 2e-5, row


def test_a_verdict_names_who_is_off(monkeypatch):
    problem = make_problem()
    right = ours(problem, backend="torch")
    wrong = {name: x * 1.01 for name, x in right.items()}
    nan = {name: x * float("nan") for name, x in right.items()}
    for theirs, mine, off in (
        (right, right, "agree"), (wrong, right, ": theirs"), (right, nan, ": ours"),
        (nan, wrong, ": theirs, ours"),
    ):  # fmt: skip
        monkeypatch.setattr(report, "ours", lambda *_, mine=mine, **__: mine)
        found = report.compare("fp32", theirs, problem)
        assert len(found) == 5 and all(row.verdict.endswith(off) for row in found), found


def test_numerics_catches_a_broken_backend(monkeypatch):
    good = machine.numerics("torch", "bf16", "cpu")
    assert good.ok and "dweight" in good.text
    right = machine.ours

    def broken(problem, *, backend):
        found = right(problem, backend=backend)
        if backend == "torch":
            found["dweight"] = found["dweight"] * 1.01
        return found

    monkeypatch.setattr(machine, "ours", broken)
    bad = machine.numerics("torch", "fp32", "cpu")
    assert bad.ok is False and "dweight beyond the limit" in bad.text and bad.remedy
    broken_backend = machine.numerics("triton", "bf16", "cpu")
    assert broken_backend.ok is False and "ValueError" in broken_backend.text


@pytest.mark.nightly
def test_the_compile_check_runs():
    pytest.importorskip("triton")
    done = machine.compiled()
    assert done.ok and "0 failed, sm_90" in done.text, done


def test_a_failing_compile_check_is_seen(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(machine.sys, "executable", "/bin/false")
    failed = machine.compiled()
    assert failed.ok is False and failed.remedy


def test_a_check_that_is_late_is_a_line_and_neither_failure_nor_traceback(monkeypatch, capsys):
    pytest.importorskip("triton")
    run = machine.subprocess.run
    given = []

    def slow(command, *, timeout, **options):
        given.append(timeout)
        return run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2, **options)

    monkeypatch.setattr(machine.subprocess, "run", slow)
    late = [c for c in (*machine.interpreted(), machine.compiled()) if "not finished" in c.text]
    assert [c.ok for c in late] == [None] * 3 and given == [300, 300, 600]
    assert "within 300 s" in late[0].text and "within 600 s" in late[-1].text
    monkeypatch.setattr(machine.subprocess, "run", run)
    monkeypatch.setattr(report, "machine_checks", lambda: late)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.count("skipped") == 3 and "FAILED" not in out and "-> Run doctor again" in out


def test_a_failed_check_is_exit_status_two(monkeypatch, capsys):
    monkeypatch.setattr(
        report, "machine_checks", lambda: [Check(False, "torch fp32: off", "do this")]
    )
    assert main(["doctor"]) == 2
    out = capsys.readouterr()
    assert "FAILED" in out.out and "-> do this" in out.out and "1 of the checks" in out.err


def test_the_report_holds_every_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        report, "machine_checks", lambda: [machine.numerics("torch", "fp32", "cpu")]
    )
    monkeypatch.setattr(report, "REPORTED", ("plain",))
    path = tmp_path / "conformance.md"
    path.write_text(
        "# Report\n\nSee also another.\n\n## Versions\n\nfound before\n", encoding="utf-8"
    )
    assert main(["doctor", "--report", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    parts = (version("torch"), "## Against plain", "logits in the input dtype", "relative errors")
    assert all(part in text for part in parts)
    for trap in (*TRAPS, *LOSS_TRAPS):
        assert trap.name.replace("[", "\\[") in text
    assert str(path) in capsys.readouterr().out
    assert text.startswith("# Report\n\nSee also another.\n\n## Versions\n\n| ")
    assert "found before" not in text


def spoilt_head(hidden, weight, *given, **options):
    return linear_logprob(hidden, weight * 1.01, *given, **options)


def test_a_model_of_your_own_is_held_against_its_logits_and_float64(tmp_path, monkeypatch, capsys):
    folder = str(save_byte_model(tmp_path))
    assert main(["doctor", "--model", folder]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("ok ")]
    assert len(lines) == 4 and f"head of {folder} [258, 32]" in lines[0]
    assert [x.split()[2] for x in lines[1:]] == ["fp32", "bf16", "fp16"]
    monkeypatch.setattr(own_model, "linear_logprob", spoilt_head)
    assert main(["doctor", "--model", folder]) == 2
    assert "-> Its log-probs are not" in capsys.readouterr().out


def test_a_pretrained_model_is_right_here(real_model):
    for check in own_model.model_checks(str(real_model)):
        assert check.ok, check
        print(check)


def test_the_command_line_compares(capsys):
    assert main(["doctor", "--against", "plain"]) == 0
    out = capsys.readouterr().out
    assert "theirs - fp64" in out and out.count("agree") == 10
    assert set(ops()) == {"riskpo", "plain", "torch", "trl", "liger", "verl"}
