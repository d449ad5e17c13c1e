"""The page of benchmarks/model.py: tables of predictions, and what was measured beside them where a
report of a GPU lies in benchmarks/results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from benchmarks.model import BOTH, FORWARDS, GPUS, USUAL, Call, ours_forward, ours_sparse, total

DENSE = 0.4  # share of active pairs above which rows go the dense way: core/softmax.py
N, V = USUAL
CASES = {
    "forward, D 1536": (FORWARDS, 1536, 0.01, 1.20),
    "forward, D 4096": (FORWARDS, 4096, 0.01, 1.10),
    "forward + backward, 1 % active, D 1536": (BOTH, 1536, 0.01, 1.50),
    "forward + backward, 1 % active, D 4096": (BOTH, 4096, 0.01, 1.50),
}
FLAT_GOAL = 4.7


# The rows of a report: this page's name of a provider, and whether its dense way is meant
PROVIDERS = {
    "riskpo_kernels": "riskpo_kernels",
    "TRL chunked log-prob": "TRL's fused head",
    "Liger fused CE, mean": "Liger's fused linear cross entropy",
    "QuACK chunked CE, mean": "QuACK's linear cross entropy",
    "Cut Cross-Entropy": "CCE (filtered cross entropy)",
}
RESULTS = Path(__file__).parent / "results"


class Seen(NamedTuple):
    """A measured row; every time in milliseconds."""

    name: str
    case: str
    gpu: str
    measured: float
    predicted: float


def seen(folder: Path) -> list[Seen]:
    """What the reports in `folder` measured of linear_logprob on one of GPUS, and what the model
    says of the same call: with the share of active pairs that the report names."""
    found = []
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(report, dict) or report.get("schema") != 1:
            continue  # of another command
        where = report["environment"].get("gpu") or ""
        gpu = next((name for name in GPUS if name in where), None)
        if gpu is None:
            continue
        for row in report["rows"]:
            sizes, name = row["sizes"], PROVIDERS.get(row["provider"])
            if row["op"] != "linear_logprob" or name is None or row["median_ms"] is None:
                continue
            if sizes["dtype"] == "float32" or sizes.get("masked_fraction"):
                continue
            entropy, table = sizes["phase"] != "forward+backward", BOTH
            if sizes["phase"] == "forward":
                table = FORWARDS
            elif name == "riskpo_kernels":
                name += ", flat rows" if row["active_share"] > DENSE else ", sparse"
            if name not in table:
                continue
            share = row["active_share"] * (1 - sizes.get("zero_fraction", 0.0))
            call = Call(sizes["n"], sizes["d"], sizes["v"], GPUS[gpu], share, entropy)
            told = total(table[name](call))
            found.append(Seen(name, row["case"], gpu, row["median_ms"], told))
    return found


def page(results: Path = RESULTS) -> str:
    rows = seen(results)
    lines = ["# Predicted: what one call should take on a GPU", ""]
    if rows:
        lines += [
            "Measured numbers stand in the first table, beside what was predicted of that call;",
            "**no other number here was measured.** `python -m benchmarks.model` adds up products,",
            "passes over the logits, bytes and launches. The head of that file says how, and which",
            "rates are assumptions.",
            "",
            "## Measured",
            "",
            "| call | GPU | measured ms | predicted ms | error |",
            "|---|---|---:|---:|---:|",
            *(
                f"| {x.name}: {x.case} | {x.gpu} | {x.measured:.2f} | {x.predicted:.2f} | "
                f"{x.predicted / x.measured - 1:+.0%} |"
                for x in rows
            ),
            "",
        ]
    else:
        lines += [
            "**No number on this page was measured.** `python -m benchmarks.model` adds up",
            "products, passes over the logits, bytes and launches. The head of that file says how,",
            "and which rates are assumptions. No device result exists yet; `tools/gpu_session.sh`",
            "will make each row right or wrong.",
            "",
        ]
    lines += [
        f"N = {N:,}, V = {V:,}, bf16. Predicted milliseconds; in brackets, multiples of one bare",
        "product of the logits on the same GPU. Peers: this model's reading of their source. Cross",
        "entropies give neither an entropy nor log-probs with gradients of their own. CCE skips",
        "whole tiles; its row takes the share of pairs for that of tiles, which flatters it.",
        "",
    ]
    return "\n".join([*lines, *_tables()])


def _tables() -> list[str]:
    lines: list[str] = []
    for case, (table, d, share, goal) in CASES.items():
        lines += [f"## {case}", "", f"| predicted | {' | '.join(GPUS)} |", "|---" * 6 + "|"]
        for name, parts in table.items():
            cells = []
            for gpu in GPUS.values():
                call = Call(N, d, V, gpu, share)
                cells.append(f"{total(parts(call)):.1f} ({total(parts(call)) / call.gemm:.2f})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        call = Call(N, d, V, GPUS["H200"], share)
        goals = {"riskpo_kernels": goal, "riskpo_kernels, sparse": goal}
        goals["riskpo_kernels, flat rows"] = FLAT_GOAL
        said = [_against(name, total(table[name](call)) / call.gemm, goals) for name in table]
        lines += ["", "Goals on an H200: " + "; ".join(filter(None, said)) + ".", ""]
    lines += ["## By kernel, H200, D 1536, 1 % active", "", "| predicted | ms |", "|---|---|"]
    call = Call(N, 1536, V, GPUS["H200"])
    for name, ms in (ours_forward(call) | ours_sparse(call)).items():
        lines.append(f"| {name} | {ms:.2f} |")
    lines += ["", "![Predicted time against the share of active pairs](predicted.png)", ""]
    sources = "; ".join(f"{name}: {gpu.source}" for name, gpu in GPUS.items())
    return [*lines, f"Rates: {sources}.", ""]


def _against(name: str, ratio: float, goals: dict[str, float]) -> str:
    """What is predicted beside the goal, where there is one."""
    if name not in goals:
        return ""
    word = "met" if ratio <= goals[name] else "missed"
    return f"{name} {goals[name]:.2f}, predicted {ratio:.3f}, {word}"


def draw(path: Path) -> None:
    """Forward + backward over the share of active pairs, H200."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = [0.0005 * 2 ** (i / 2) for i in range(20)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), dpi=130, sharey=True, layout="constrained")
    for axis, d in zip(axes, (1536, 4096), strict=True):
        for name, parts in BOTH.items():
            calls = [Call(N, d, V, GPUS["H200"], share) for share in shares]
            axis.plot(shares, [total(parts(c)) / c.gemm for c in calls], label=name)
        axis.set_xscale("log")
        axis.set_title(f"predicted, H200, D = {d}, N = {N:,}, V = {V:,}", fontsize="small")
        axis.set_xlabel("share of active (row, 128 columns) pairs")
        axis.grid(color="#e3e7ea")
    axes[0].set_ylabel("predicted time, bare logits products")
    axes[0].set_ylim(0, 9)
    axes[1].legend(fontsize="x-small", frameon=False)
    figure.savefig(path)
