"""Errors of the losses' formulas where they cancel, beside the textbook lines: docs/accuracy.md.

    python -m tools.loss_accuracy        # prints the table

Relative errors against 50 decimal digits, of the same float32 (pass@k: float64) inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, getcontext

import torch

from riskpo.group_advantages import GROUP_STD_EPS, GroupAdvantage, over_std
from riskpo_kernels import clipped_surrogate, pass_at_k

getcontext().prec = 50
Number = float | torch.Tensor


@dataclass(frozen=True)
class Row:
    """One formula at one working point; `limit` is what tests hold it to."""

    name: str
    point: str
    truth: Decimal
    textbook: Callable[[], Number]
    ours: Callable[[], Number]
    limit: float

    def errors(self) -> tuple[float, float]:
        """Of the textbook's line and of ours: relative, or absolute where the truth is 0."""
        scale = abs(self.truth) or Decimal(1)
        found = [Decimal(float(f())) - self.truth for f in (self.textbook, self.ours)]
        return float(abs(found[0]) / scale), float(abs(found[1]) / scale)


def surrogate(new: float, old: float, backend: str, **options: float | str) -> dict[str, Number]:
    """Loss, slope and stats of one token with advantage 0 against a reference, or 1 against old."""
    logprob = torch.tensor([new], requires_grad=True)
    given = torch.tensor([old])
    against = {"ref_logprob": given} if options else {}
    out = clipped_surrogate(
        logprob,
        logprob.detach() if options else given,
        torch.zeros(1) if options else torch.ones(1),
        ratio="token",
        aggregate="token-mean",
        backend=backend,
        **against,
        **options,  # type: ignore[arg-type]
    )
    out.loss.backward()
    assert logprob.grad is not None
    return {"loss": out.loss.detach(), "slope": logprob.grad[0]} | out.stats


def k3_rows(backend: str) -> list[Row]:
    """Value and slope of k3, u = ref - new exact in float32."""
    rows = []
    for size in (1e-1, 1e-2, 1e-4, -1e-4, 1e-6):
        new = torch.tensor(-0.001 - max(size, 0.0))
        ref = new + size
        u = ref - new
        x = Decimal(u.item())
        got = surrogate(new.item(), ref.item(), backend, kl_coef=1.0, kl="k3")
        point = f"u = {size:g}"
        rows += [
            Row("k3", point, x.exp() - 1 - x, lambda u=u: u.exp() - 1 - u,
                lambda got=got: got["loss"], 3e-7),
            Row("slope of k3", point, 1 - x.exp(), lambda u=u: 1 - u.exp(),
                lambda got=got: got["slope"], 3e-7),
        ]  # fmt: skip
    return rows


def ratio_rows(backend: str) -> list[Row]:
    """The ratio near 1: log-probs are subtracted before the exponential."""
    new, old = torch.tensor(-2.0), torch.tensor(-2.0) + 2.0**-20
    got = surrogate(new.item(), old.item(), backend)
    truth = (Decimal(new.item()) - Decimal(old.item())).exp()
    textbook = lambda: new.exp() / old.exp()  # noqa: E731
    return [
        Row("ratio", "log-ratio -1e-6", truth, textbook, lambda: got["ratio_mean"], 1.2e-7),
        Row("slope of the ratio", "log-ratio -1e-6", -truth, lambda: -textbook(),
            lambda: got["slope"], 1.2e-7),
    ]  # fmt: skip


def advantage_rows() -> list[Row]:
    """GRPO's advantage of equal rewards, which is 0, and of rewards with a large offset."""

    def textbook(rewards: torch.Tensor) -> torch.Tensor:
        return ((rewards - rewards.mean()) / (rewards.std() + GROUP_STD_EPS))[0]

    def ours(rewards: torch.Tensor) -> torch.Tensor:
        return GroupAdvantage(over_std)(rewards, ["q"] * len(rewards), step=1)[0][0]

    equal, offset = torch.full((7,), 0.1), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]) + 2.0**20
    std = (Decimal(6) / Decimal(20)).sqrt()
    rows = (
        ("seven rewards of 0.1", equal, Decimal(0)),
        ("rewards 0 and 1 plus 2^20", offset, Decimal("0.6") / (std + Decimal("1e-6"))),
    )
    return [
        Row("group advantage", point, truth, lambda x=x: textbook(x), lambda x=x: ours(x), 1e-7)
        for point, x, truth in rows
    ]


def pass_rows() -> list[Row]:
    """pass@k of many samples, few of them right."""
    rows = []
    for n, c, k in ((10**6, 1, 1), (10**9, 3, 8), (1024, 2, 256)):
        truth = 1 - Decimal(math.comb(n - c, k)) / Decimal(math.comb(n, k))
        i = torch.arange(k, dtype=torch.float64)
        rows.append(
            Row("pass@k", f"n = {n}, c = {c}, k = {k}", truth,
                lambda n=n, c=c, i=i: 1 - ((n - c - i) / (n - i)).prod(),
                lambda n=n, c=c, k=k: pass_at_k(n, c, k), 1e-14)
        )  # fmt: skip
    return rows


def all_rows(backend: str = "torch") -> list[Row]:
    return [*k3_rows(backend), *ratio_rows(backend), *advantage_rows(), *pass_rows()]


def table() -> str:
    """Markdown."""
    lines = ["| formula | at | textbook line | here | held to |", "|---|---|---|---|---|"]
    for row in all_rows():
        plain, mine = row.errors()
        numbers = f"{plain:.0e} | {mine:.0e} | {row.limit:.0e}"
        lines.append(f"| {row.name} | {row.point} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
