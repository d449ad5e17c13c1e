"""`python -m tools.risk_signal`: signal, noise and weight by difficulty of advantage estimators.

A Bernoulli policy answers Q questions, right with probability p_q ~ Beta(.6, .8), G times each. The
gradient of question q with respect to its logit is g_q = mean over its responses of advantage
times (r - p_q). Over many batches:

    signal to noise   sum_q (E g_q)^2 / sum_q Var g_q
    weight            E g_q / (p_q (1 - p_q)): 1 is the gradient of the mean reward

The quantiles of the bundled estimators are those of the score distribution, known beforehand.
The bundled ones are riskpo_kernels.RiskPOAdvantage itself, the others those of the trainer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from riskpo.group_advantages import (
    Advantage,
    CurveAdvantage,
    GroupAdvantage,
    difficulty_weighted,
    minus_others,
    over_mean,
    over_std,
    risk_seeking,
)
from riskpo_kernels import RiskPOAdvantage, bundle_scores

Q, G, B = 200, 8, 5
OPTIONS = {
    "RiskPO as published": {},
    "RiskPO, leave-one-out": {"baseline": "leave-one-out"},
    "conditional": {"baseline": "leave-one-out", "credit": "conditional"},
}
MATCHED = {"bundling": "matched", "difficulty": "prior"}
Estimator = Callable[[torch.Tensor, int], torch.Tensor]  # rewards [Q, G], step -> advantages [Q, G]


def quantiles(p: torch.Tensor, matched: bool, g: torch.Generator) -> list[float]:
    """Levels .2 and .8 of the scores of many bundles."""
    scores = []
    for _ in range(50):
        order = p.argsort() if matched else torch.randperm(Q, generator=g)
        r = (torch.rand(Q, G, generator=g, dtype=torch.float64) < p[order, None]).double()
        scores.append(bundle_scores(r, B).flatten())
    levels = torch.tensor([0.2, 0.8], dtype=torch.float64)
    return torch.quantile(torch.cat(scores), levels).tolist()


def bundled(p: torch.Tensor, matched: bool, options: dict, g: torch.Generator) -> Estimator:
    """RiskPOAdvantage with its tracked quantiles set and hardly moving."""
    advantage = RiskPOAdvantage(**options, **(MATCHED if matched else {}), tracker_step=1e-9)
    state = advantage.state_dict()
    state["tracker"]["quantiles"] = quantiles(p, matched, g)
    advantage.load_state_dict(state)
    ids = torch.arange(Q).repeat_interleave(G)
    given = {"prior": p[ids]} if matched else {}
    return lambda r, step: advantage(r.flatten(), ids, step=step, **given)[0].double().view(Q, G)


def by_group(advantage: Advantage) -> Estimator:
    ids = [str(i) for i in range(Q) for _ in range(G)]
    return lambda r, step: advantage(r.flatten(), ids, step=step)[0].double().view(Q, G)


def estimators(p: torch.Tensor, g: torch.Generator) -> dict[str, Estimator]:
    found = {
        "RLOO": by_group(GroupAdvantage(minus_others)),
        "GRPO": by_group(GroupAdvantage(over_std)),
        "MaxRL": by_group(GroupAdvantage(over_mean)),
        "RS-GRPO": by_group(GroupAdvantage(risk_seeking)),
        "CurveRL": by_group(CurveAdvantage()),
        "difficulty-weighted": by_group(GroupAdvantage(difficulty_weighted)),
    }
    for name, options in OPTIONS.items():
        for matched in (False, True):
            label = f"{name}, {'matched' if matched else 'random'} bundles"
            found[label] = bundled(p, matched, options, g)
    return found


def measure(batches: int, seed: int = 1) -> tuple[torch.Tensor, dict[str, dict[str, list[float]]]]:
    """p [Q], and of each estimator the mean and the variance of every question's gradient."""
    g = torch.Generator().manual_seed(seed)
    beta = torch.distributions.Beta(torch.tensor(0.6).double(), torch.tensor(0.8).double())
    torch.manual_seed(seed)
    p = beta.sample((Q,)).clamp(0.002, 0.998)
    found = estimators(p, g)
    sums = {name: torch.zeros(2, Q, dtype=torch.float64) for name in found}
    for step in range(batches):
        r = (torch.rand(Q, G, generator=g, dtype=torch.float64) < p[:, None]).double()
        for name, estimate in found.items():
            gradient = (estimate(r, step) * (r - p[:, None])).mean(1)
            sums[name] += torch.stack([gradient, gradient**2])
        if step % 50 == 0:
            print(f"{step} of {batches} batches", flush=True)
    result = {}
    for name, (first, second) in sums.items():
        mean = first / batches
        variance = second / batches - mean**2
        result[name] = {"mean": mean.tolist(), "variance": variance.tolist()}
    return p, result


def table(p: torch.Tensor, result: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        "| estimator | signal to noise | weight, hard (p < .2) | middle | easy (p > .8) |",
        "|---|---|---|---|---|",
    ]
    base, hard, easy = p * (1 - p), p < 0.2, p > 0.8
    for name, found in result.items():
        mean, variance = torch.tensor(found["mean"]), torch.tensor(found["variance"])
        parts = [mean[c].sum() / base[c].sum() for c in (hard, ~hard & ~easy, easy)]
        cells = " | ".join(f"{float(x):.2f}" for x in parts)
        lines.append(f"| {name} | {float((mean**2).sum() / variance.sum()):.2f} | {cells} |")
    return "\n".join(lines)


def draw(path: Path, p: torch.Tensor, result: dict[str, dict[str, list[float]]]) -> None:
    """Weight against difficulty, averaged over ten classes of p."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {
        "GRPO": ("#999933", "v"),
        "MaxRL": ("#cc79a7", "D"),
        "RLOO": ("#222222", "o"),
        "difficulty-weighted": ("#56b4e9", "P"),
        "RiskPO as published, random bundles": ("#d55e00", "s"),
        "conditional, matched bundles": ("#0072b2", "^"),
    }
    figure, axis = plt.subplots(figsize=(7, 4), dpi=130, layout="constrained")
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    for name, (colour, marker) in shown.items():
        mean = torch.tensor(result[name]["mean"], dtype=torch.float64)
        inside = [(p >= a) & (p < b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        y = [float(mean[c].sum() / (p * (1 - p))[c].sum()) for c in inside]
        label = {"conditional, matched bundles": "preset 'matched'"}.get(name, name)
        middle = ((edges[:-1] + edges[1:]) / 2).tolist()
        axis.plot(middle, y, color=colour, marker=marker, label=label)
    axis.set_xlabel("probability that a response is right")
    axis.set_ylabel("weight of the question's gradient")
    axis.set_yscale("log")
    axis.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
    axis.minorticks_off()
    axis.grid(color="#e3e7ea")
    axis.legend(loc="upper right", fontsize="small", frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=600, help="of an estimator")
    parser.add_argument("--picture", type=Path, help="write weight against difficulty here, as PNG")
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    given = parser.parse_args()
    p, result = measure(given.batches)
    print(table(p, result))
    if given.out:
        given.out.write_text(json.dumps({"p": p.tolist()} | result) + "\n", encoding="utf-8")
    if given.picture:
        draw(given.picture, p, result)


if __name__ == "__main__":
    main()
