"""What the benchmarks time beside ours computes what they say; Triton peers run interpreted."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_fused, bench_linear_logprob, peers, truth
from riskpo_kernels import reference

ROOT = Path(__file__).resolve().parents[2]
HEAD = {
    "n": 32,
    "d": 24,
    "v": 300,
    "dtype": "float32",
    "regime": "sft",
    "zero_fraction": 0.0,
}
# Interpreted here. Not "Cut Cross-Entropy": its kernels use inline assembly; not "QuACK": it is
# written in CuTe; not "verl Triton": it asks the CUDA driver for streams and device properties.
INTERPRETED = ("Liger fused CE, mean", "fla fused CE, mean")


def fused_inputs():
    """16 sequences of 4 tokens: without an advantage, within the clips, beyond either of them."""
    given = bench_fused.inputs(**HEAD | {"n": 64, "zero_fraction": 0.25})
    given.pop("_facts")
    beyond = torch.tensor([-2e-2, 1e-4, 2e-2, -1e-4]).repeat(4)  # nats per token
    given["old_logprob"] = given["old_logprob"] + beyond.repeat_interleave(4)
    given["advantage"] = given["advantage"] * torch.tensor([1.0, -1.0]).repeat_interleave(8)
    return given


@pytest.mark.parametrize("name", ["plain", "Liger chunked", "Liger Triton"])
def test_rivals_of_the_whole_loss_compute_our_loss(name):
    provider = bench_fused.providers()[name]
    if name.startswith("Liger"):
        pytest.importorskip("liger_kernel")
    given = fused_inputs()
    with torch.no_grad():
        stats = reference.riskpo_loss(**given).stats
    assert 0.1 < stats["clip_fraction"] < 0.9, "the clips must matter, and not to every sequence"
    found = bench_fused.errors(provider, given, bench_fused.truths(given))
    assert found["loss_error"] < 1e-6 and found["gradient_error"] < 1e-5, found


def test_errors_of_the_whole_loss_are_taken_where_there_is_a_gradient():
    given = bench_fused.inputs(**HEAD | {"n": 2**15, "d": 4, "zero_fraction": 0.5})
    exact = bench_fused.truths(given)
    assert exact["part"]["advantage"].numel() == 1 and exact["part"]["advantage"] != 0
    assert exact["part"]["cu_seqlens"].tolist() == [0, 2048]
    assert exact["dw"].norm() > 0


@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize("name", peers.HEADS)
def test_heads_that_run_on_a_cpu_compute_the_log_probs(name, masked):
    if peers.HEADS[name].slow_start:
        pytest.skip("compiles for long")
    given = bench_linear_logprob.inputs(**HEAD, phase="forward+backward", masked_fraction=masked)
    given.pop("_facts")
    provider = bench_linear_logprob.providers()[name]
    if provider.why_not(given):
        pytest.skip(provider.why_not(given))
    found = truth.Head(given).errors(provider.run, provider.per_token)
    assert found.get("logprob_error_nats", 0) < 1e-4 and found["gradient_error"] < 1e-4, found


def test_every_peer_that_is_installed_has_the_op_that_is_called():
    """In a process of its own: run_alone leaves the package unfit for anything else."""
    program = (
        "from benchmarks import peers\n"
        "peers.run_alone('verl', 'verl.utils')\n"
        "for head in (peers.TRL, peers.LIGER, peers.LIGER_CE, peers.CCE, peers.QUACK, peers.FLA,\n"
        "             peers.VERL_TRITON, peers.VERL):\n"
        "    print(peers.find(*head)[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    reasons = done.stdout.splitlines()
    assert len(reasons) == 8 and not any("AttributeError" in r for r in reasons), reasons
    if importlib.util.find_spec("verl"):
        assert reasons[-2:] == ["None", "None"]


def test_a_cute_peer_says_what_it_lacks():
    if importlib.util.find_spec("quack"):
        pytest.skip("QuACK is installed")
    reason = peers.HEADS["QuACK chunked CE, mean"].why_not(torch.device("cuda"), torch.bfloat16)
    assert "No module named 'quack'" in reason and "--fetch cute" in reason


def test_a_module_runs_without_its_package(tmp_path, monkeypatch):
    inside = tmp_path / "needy" / "ops"
    inside.mkdir(parents=True)
    for folder in (inside, inside.parent):
        (folder / "__init__.py").write_text("import nowhere_installed")
    (inside / "pure.py").write_text("from needy import other\nanswer = other.value")
    (inside.parent / "other.py").write_text("value = 42")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert "ModuleNotFoundError" in peers.find("needy.ops.pure", "answer")[1]
        peers.run_alone("needy", "needy.ops")
        assert peers.find("needy.ops.pure", "answer") == (42, None)
        peers.run_alone("nowhere_installed")  # nothing to do
        assert "nowhere_installed" not in sys.modules
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "needy"]:
            del sys.modules[name]


@pytest.mark.parametrize("name", INTERPRETED)
def test_triton_heads_compute_the_mean_loss(name):
    head = peers.HEADS[name]
    pytest.importorskip(name.split()[0].lower().replace("liger", "liger_kernel"))
    given = bench_linear_logprob.inputs(**HEAD, phase="forward+backward")
    given.pop("_facts")
    anywhere = dataclasses.replace(head, why_not=lambda device, dtype: None)
    provider = bench_linear_logprob._peer(name, anywhere)
    assert provider.why_not(given) is None
    found = truth.Head(given).errors(provider.run, per_token=False)
    assert found["loss_error"] < 1e-5 and found["gradient_error"] < 1e-5, found
