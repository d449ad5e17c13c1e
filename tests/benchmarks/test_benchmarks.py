"""The benchmarks run end to end on a CPU, say what they must, and notice what is wrong."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    bench_linear_logprob,
    harness,
    memory,
    real_rows,
    regimes,
    report,
    sets,
    table,
)
from benchmarks.provider import Provider
from riskpo.model.load import load_policy
from riskpo_kernels.core.matmul import counting
from tests.toy import save_byte_model

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TINY = {
    "n": 64,
    "d": 256,
    "v": 1024,
    "dtype": "float32",
    "regime": "rl",
    "zero_fraction": 0.5,
    "phase": "forward+backward",
}


def run(*words):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("quick") / "quick.json"
    run("--quick", "--out", str(path), "--note", "a note")
    return path


@pytest.mark.slow
def test_quick_writes_every_field(quick):
    found = json.loads(quick.read_text())
    assert found["schema"] == 1 and found["note"] == "a note"
    assert {"date", "command", "packages", "processor", "commit"} <= found["environment"].keys()
    assert str(quick.parent) not in quick.read_text()  # no path of this machine
    done = [r for r in found["rows"] if r["reason"] is None]
    assert {r["op"] for r in done} >= {"linear_logprob", "logits_logprob", "fused", "risk"}
    for row in found["rows"]:
        assert row.keys() == set(harness.FIELDS)
        assert (row["median_ms"] is None) == (row["reason"] is not None)
    for row in (r for r in done if r["op"] == "linear_logprob"):
        assert row["gemm_multiple"] == pytest.approx(row["median_ms"] / row["gemm_ms"])
        assert row["logprob_error_nats"] < 1e-3 and 0 < row["active_share"] <= 1
        assert row["peak_mib"] >= 0 and row["peak_how"] and row["logits_in"] and row["sums_in"]
        assert row["units"] >= 2 * (1 - row["sizes"]["masked_fraction"])


@pytest.mark.slow
def test_the_readme_holds_what_was_measured(tmp_path):
    """Its table is that of the newest results: no number of it is written by hand."""
    root = Path(__file__).resolve().parents[2]
    newest = max((root / "benchmarks" / "results").glob("cpu-*.json"))
    copy = tmp_path / "README.md"
    copy.write_text((root / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    assert report.main([str(newest), "--readme", str(copy)]) == 0
    text = copy.read_text(encoding="utf-8")
    assert text == (root / "README.md").read_text(encoding="utf-8")
    assert text.count("MiB) |") >= 8, "no rows"
    copy.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="needs one line"):
        report.main([str(newest), "--readme", str(copy)])


def test_report_makes_tables_and_plots(quick, tmp_path):
    pytest.importorskip("matplotlib")
    tables = tmp_path / "tables.md"
    assert report.main([str(quick), "--markdown", str(tables), "--plots", str(tmp_path)]) == 0
    text = tables.read_text()
    assert "| riskpo_kernels | torch |" in text and "numbers mean nothing" in text
    for name in ("time-vs-n", "memory-vs-n", "error-vs-time"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_dry_rehearses_the_gpu_run_and_stops_at_its_budget(tmp_path):
    path = tmp_path / "dry.json"
    out = run("--dry", "--budget-seconds", "3", "--out", str(path))
    found = json.loads(path.read_text())
    assert found["rows"] and found["left_out"] and "left out" in out
    assert not any(r["failed"] and r["kind"] == "ours" for r in found["rows"])


def test_gpu_run_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    from benchmarks.__main__ import main

    assert main(["--gpu"]) == 2


def test_the_sets_hold_what_they_must():
    heads = [c.sizes for c in sets.cpu() if c.op == "linear_logprob"]
    assert {1024, 4096, 16384, 32768, 65536} <= {s["n"] for s in heads}
    for cases in (sets.cpu(), sets.gpu()):
        for key in ("zero_fraction", "masked_fraction"):
            assert {c.sizes[key] for c in cases if c.op == "linear_logprob"} == {0.0, 0.5}
        assert any(c.compile for c in cases)
    assert 262144 in {c.sizes["n"] for c in sets.gpu() if c.op == "linear_logprob"}


def test_every_case_of_every_set_fits_its_module():
    for cases in sets.SETS.values():
        for case in cases():
            module = importlib.import_module(f"benchmarks.bench_{case.op}")
            assert module.CASES and module.providers()
            if case.sizes:
                assert all(x > 0 for x in module.cost(**case.sizes).values())


@pytest.mark.parametrize(
    ("regime", "entropy", "share"),
    [
        ("flat", (2.5, 4.2), (0.5, 1)),
        ("sft", (0.8, 1.5), (0.05, 0.2)),
        ("rl", (0.4, 0.8), (0, 0.07)),
    ],
)
def test_regimes_resemble_a_trained_head(regime, entropy, share):
    rows = regimes.make(256, 256, 16384, regime, dtype=torch.float32, device=CPU)
    assert entropy[0] < rows.entropy_nats < entropy[1]
    assert share[0] < rows.active_share < share[1]
    again = regimes.make(256, 256, 16384, regime, dtype=torch.float32, device=CPU)
    assert torch.equal(rows.target, again.target)


def test_lifted_rows_keep_their_logits(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    hidden, weight = torch.randn(8, 16), torch.randn(64, 16)
    path = str(tmp_path / "rows.safetensors")
    safetensors.save_file({"hidden": hidden, "weight": weight}, path)
    rows = regimes.make(20, 32, 100, "flat", dtype=torch.float32, device=CPU, rows=path)
    logits = rows.hidden @ rows.weight.T
    torch.testing.assert_close(logits[:8, :64], hidden @ weight.T, atol=2e-4, rtol=0)
    torch.testing.assert_close(logits[8:16], logits[:8])
    assert (logits[:, 64:] <= logits[:, 48:64].max(1, keepdim=True).values + 2e-4).all()


def test_a_pretrained_models_rows_are_its_own_answers(tmp_path):
    found = real_rows.register(str(save_byte_model(tmp_path / "tiny")))
    assert found == [("tiny at 0.6", 32, 258), ("tiny at 1", 32, 258)]
    sharp, flat = (regimes.make(96, d, v, x, dtype=torch.float32, device=CPU) for x, d, v in found)
    assert sharp.entropy_nats < flat.entropy_nats
    policy = load_policy(str(tmp_path / "tiny"))
    asked = policy.tokenizer(real_rows.ASKED[0], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = policy.model(asked).logits[0, -1]
    torch.testing.assert_close(sharp.hidden[0] @ sharp.weight.T, logits / 0.6)
    given = command.parse(["--model", str(tmp_path / "tiny")])
    cases = command.pretrained_cases(given)
    assert len(cases) == 3 and all(x.sizes["regime"] in real_rows.REGIMES for x in cases)
    left = [command.settings(given, x).deadline - time.monotonic() for x in ([], cases)]
    assert left == pytest.approx([400, 1300], abs=5)  # what the others have is not taken from them
    with pytest.raises(ValueError, match=r"head \[V, D\] of \[258, 32\], not \[100, 32\]"):
        regimes.make(96, 32, 100, "tiny at 1", dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_coefficients_are_of_one_sign_and_zero_by_sequence(fraction):
    c = regimes.coefficients(160, fraction, CPU).view(16, 10)
    assert (c <= 0).all() and (c == c[:, :1]).all()
    assert (c[:, 0] == 0).sum() == round(16 * fraction)


def test_peak_memory_sees_a_buffer_and_not_the_gradients():
    leaf = torch.zeros(2**20, requires_grad=True)

    def call():
        buffer = torch.ones(2**24)  # 64 MiB
        leaf.grad = torch.ones(2**20)
        return buffer.sum()

    peak, how = memory.peak_of(call, {"x": leaf}, "cpu")
    if how == "not measurable here":
        pytest.skip(how)
    assert 60 < peak < 70, (peak, how)


@pytest.mark.usefixtures("recomputed")
@pytest.mark.parametrize("zero_fraction", [0.0, 0.5])
def test_units_are_what_was_launched(zero_fraction):
    """Exact: forward 2 and backward 6 of the rows with a coefficient. Sparse: 6 per active pair,
    and the rows that a nearly full block adds."""
    sizes = TINY | {"zero_fraction": zero_fraction, "regime": "rl-late"}
    settings = harness.Settings(seconds_per_row=0, accuracy=False, only=("riskpo",))
    rows = {
        r["provider"]: r for r in harness.run_case(bench_linear_logprob, "one", sizes, settings)
    }
    exact = 2 + 6 * (1 - zero_fraction)
    assert rows["riskpo_kernels"]["units"] == pytest.approx(exact)
    sparse = rows["riskpo_kernels, tail_eps=2^-14"]
    assert 2 < sparse["units"] < exact - 1
    assert sparse["units"] == pytest.approx(2 + (exact - 2) * sparse["active_share"], rel=0.5)


def fake(providers):
    return types.SimpleNamespace(
        __name__="bench_fake",
        inputs=lambda device="cpu": {"x": torch.ones(4)},
        providers=lambda: providers,
        cost=lambda: {"bytes": 1.0, "flops": 1.0},
    )


def test_providers_that_cannot_run_say_why():
    def fails(x):
        raise RuntimeError("broken\nand more")

    rows = harness.run_case(
        fake(
            {
                "riskpo good": lambda x: x + 1,
                "bad": Provider(fails),
                "absent": Provider(fails, why_not=lambda given: "not installed"),
                "slow": Provider(fails, slow_start=True),
            }
        ),
        "one",
        {},
        harness.Settings(seconds_per_row=0),
    )
    good, bad, absent, slow = rows
    assert good["reason"] is None and good["median_ms"] > 0 and good["kind"] == "ours"
    assert bad["failed"] and bad["reason"] == "RuntimeError: broken"
    assert not absent["failed"] and absent["reason"] == "not installed"
    assert "--compile" in slow["reason"]
    assert "not installed" in table.terminal("fake", "one", [good, absent])


@pytest.mark.parametrize("asked", [False, True])
def test_a_case_may_ask_for_what_compiles_for_long(asked):
    from benchmarks.__main__ import measure

    module = fake({"slow": Provider(lambda x: x, slow_start=True)})
    case = sets.Case("fake", "one", {}, compile=asked)
    (row,) = measure(module, "one", {}, harness.Settings(seconds_per_row=0), case)
    assert (row["median_ms"] is not None) == asked


def test_a_peer_that_would_take_too_long_is_left_out_with_its_time():
    def slow(x):
        time.sleep(0.02)

    module = fake({"peer": Provider(slow), "plain": Provider(slow, kind="plain")})
    module.inputs = lambda n, device="cpu": {"x": torch.ones(n)}
    module.cost = lambda n: {"bytes": 1.0, "flops": 1.0}
    s = harness.Settings(seconds_per_row=0, longest_call=0.1)
    assert all(r["reason"] is None for r in harness.run_case(module, "few", {"n": 4}, s))
    peer, plain = harness.run_case(module, "many", {"n": 64}, s)
    assert "one call would take" in peer["reason"] and plain["reason"] is None


def test_a_spent_budget_leaves_the_rest_out():
    s = harness.Settings(deadline=0.0)
    assert not list(harness.run_case(fake({"a": lambda x: x}), "one", {}, s))
    assert s.left_out == ["fake one: a"]


REGRESSION = {
    "linear_logprob": TINY,
    "logits_logprob": {k: TINY[k] for k in ("n", "v", "dtype", "regime", "phase")},
    "fused": {k: v for k, v in TINY.items() if k != "phase"},
    "surrogate": {"sequences": 16, "mean_tokens": 64, "ratio": "sequence"},
    "risk": {"bundles": 102, "draws": 10},
}


needs_pytest_benchmark = pytest.mark.skipif(
    importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is missing"
)
LM_ROWS = ROOT.parent / "shared" / "data" / "lm_rows" / "rows.safetensors"


@needs_pytest_benchmark
@pytest.mark.parametrize(("regime", "most"), [("rl", 2.5), ("rl-late", 2.2)])
def test_cpu_regression_of_the_work(regime, most, benchmark):
    """Times vary, what is executed does not: the forward's 2 units, and next to nothing back."""
    rows = str(LM_ROWS) if LM_ROWS.exists() else None  # else the generator fitted to them
    sizes = {"n": 512, "v": 16384, "regime": regime, "zero_fraction": 0.0}
    given = bench_linear_logprob.inputs(**TINY | sizes, rows=rows)
    facts = given.pop("_facts")
    ours = bench_linear_logprob.providers()["riskpo_kernels, tail_eps=2^-14"]
    with counting() as work:
        benchmark.pedantic(lambda: ours(**given), rounds=1, iterations=1)
    units = 2 * work.multiply_adds / (512 * TINY["d"] * 16384)
    benchmark.extra_info["units"] = units
    assert 2 + 6 * facts["active_share"] * 0.5 < units < most


@needs_pytest_benchmark
@pytest.mark.parametrize("op", REGRESSION)
def test_cpu_regression_set(op, benchmark):
    """Our own provider on a small case; compare runs with --benchmark-autosave and
    --benchmark-compare."""
    module = importlib.import_module(f"benchmarks.bench_{op}")
    given = module.inputs(**REGRESSION[op])
    given.pop("_facts", None)
    providers = {n: harness.as_provider(n, p) for n, p in module.providers().items()}
    ours = [p for p in providers.values() if p.kind == "ours" and p.why_not(given) is None]
    benchmark.pedantic(lambda: ours[0](**given), rounds=3, iterations=1, warmup_rounds=1)
