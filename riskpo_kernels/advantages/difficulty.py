"""How hard is a question? What matched bundles are sorted by.

Difficulty must be known from elsewhere than the rewards that are being credited: bundles chosen by
those rewards are correlated with them, and the gradient is biased
(tests/advantages/test_conditional.py enumerates it). Three sources are free of that:

    history     an exponential mean of the question's mean reward at earlier steps; a question that
                was never seen counts as average
    prior       a number per question that the caller gives, larger for easier ones: a pass rate of
                another model, or minus a level
    cross-fit   one half of a question's responses chooses the bundle in which the other half is
                credited, and the other way round
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from riskpo_kernels.core.checks import reject

OP = "RiskPOAdvantage"


class RewardHistory:
    """Exponential mean of the mean reward, by question: mean += rate * (reward - mean)."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.means: dict[str, float] = {}

    def update(self, rewards: Mapping[str, float]) -> None:
        """One step's mean reward of each question in it."""
        for name, reward in rewards.items():
            mean = self.means.get(name, reward)
            self.means[name] = mean + self.rate * (reward - mean)

    def only(self, names: Iterable[str]) -> RewardHistory:
        """A copy of what is known of `names`."""
        found = RewardHistory(self.rate)
        found.means = {name: self.means[name] for name in names if name in self.means}
        return found

    def difficulty(self, names: Sequence[str]) -> dict[str, float]:
        """Expected reward of each; of unseen ones the mean over the seen ones among `names`."""
        seen = [self.means[name] for name in names if name in self.means]
        average = statistics.fmean(seen) if seen else 0.0
        return {name: self.means.get(name, average) for name in names}

    def known(self, names: Sequence[str]) -> float:
        """Share of `names` that were seen before."""
        return sum(name in self.means for name in names) / max(len(names), 1)


def prior_of(prior: Any, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """The caller's number for each question; `prior` [N] has one for each response.

    ValueError where it is missing, not finite, or differs within a question.
    """
    todo = "Pass prior=, one number per response, larger for easier questions."
    if prior is None:
        reject(OP, "difficulty='prior' without a prior", "one number per response", todo)
    values = [float(x) for x in (prior.tolist() if hasattr(prior, "tolist") else prior)]
    count = sum(map(len, groups.values()))
    if len(values) != count:
        reject(OP, f"{len(values)} values of prior", f"{count}, one per reward", todo)
    found = {}
    for name, rows in groups.items():
        own = {values[row] for row in rows}
        if len(own) > 1 or not abs(next(iter(own))) < float("inf"):
            came = f"prior {sorted(own)} for question {name[2:]!r}"
            reject(OP, came, "one finite number per question", todo)
        found[name] = own.pop()
    return found
