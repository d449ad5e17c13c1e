"""Advantages that compare the responses to one question: a formula each, no bundles.

Q questions, G responses each, R = Q * G rollouts, question-major. Sources stand at the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

GROUP_STD_EPS = 1e-6
RS_BETA = 2.0
EASY_DISCOUNT = 0.6
CURVE_STEPS = 10


class Advantage(Protocol):
    """(rewards [R], question ids of the R rows) -> (advantage [R], detached; numbers to log).

    prior [R] is given with difficulty="prior" only, see RiskPOAdvantage.
    """

    def __call__(
        self,
        rewards: torch.Tensor,
        question_id: Sequence[str],
        *,
        step: int,
        prior: Sequence[float] | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """By default nothing: every step stands alone."""
        return None


def check_responses(what: str, responses: int) -> None:
    """ValueError for one response per question: an advantage that compares would always be 0."""
    if responses < 2:
        raise ValueError(
            f"config: got responses_per_question={responses} with {what}; expected at least 2, "
            "since the advantage compares the responses to a question. Raise "
            "responses_per_question."
        )


def over_std(r: torch.Tensor) -> torch.Tensor:
    """GRPO (arXiv 2402.03300): minus the mean of the question's G, over their std (ddof 1)."""
    return minus_mean(r) / ((r - r[:, :1]).std(1, keepdim=True) + GROUP_STD_EPS)


def minus_mean(r: torch.Tensor) -> torch.Tensor:
    """Dr. GRPO (2503.20783): minus the mean of the question's G."""
    d = r - r[:, :1]  # equal rewards give exactly 0
    return d - d.mean(1, keepdim=True)


def minus_others(r: torch.Tensor) -> torch.Tensor:
    """RLOO (2402.14740): minus the mean of the question's other responses."""
    return minus_mean(r) * (r.shape[1] / (r.shape[1] - 1))


def over_mean(r: torch.Tensor) -> torch.Tensor:
    """MaxRL (2602.02710): minus the mean and over it; 0 where the mean is 0."""
    mean = r.mean(1, keepdim=True)
    return torch.where(mean > 0, minus_mean(r) / mean.clamp(min=1e-12), 0.0)


def difficulty_weighted(r: torch.Tensor) -> torch.Tensor:
    """RLOO times 1 - .6 m, where m is the mean reward of the question's other responses.

    Not from a paper: the control of riskpo-matched without bundles or quantiles. With rewards of 0
    and 1, a question solved with probability p gets the weight 1 - .6 p, about that of matched
    bundles. The estimate is unbiased, since m does not depend on the response it weighs.
    """
    others = (r.sum(1, keepdim=True) - r) / (r.shape[1] - 1)
    return minus_others(r) * (1 - EASY_DISCOUNT * others)


def risk_seeking(r: torch.Tensor) -> torch.Tensor:
    """RS-GRPO (2509.24261): (e^(beta r) over its mean, minus 1) / beta, with beta = 2."""
    d = RS_BETA * (r - r.amax(1, keepdim=True))  # never overflows
    e = d.exp()
    return minus_mean(e) / (RS_BETA * e.mean(1, keepdim=True))


class GroupAdvantage(Advantage):
    """A formula over the G rewards of each question, [Q, G] -> [Q, G], in float64."""

    def __init__(self, formula: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.formula = formula

    def __call__(
        self,
        rewards: torch.Tensor,
        question_id: Sequence[str],
        *,
        step: int,
        prior: Sequence[float] | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        rewards_QG = by_question(rewards, question_id)
        check_responses("the advantage of a group", rewards_QG.shape[1])
        advantage = self.formula(rewards_QG.double()).to(rewards.dtype).flatten()
        return advantage, {"zero_advantage_fraction": float((advantage == 0).float().mean())}


class NoAdvantage(GroupAdvantage):
    """0 for every response: rewards are logged, and the loss does not use them."""

    def __init__(self) -> None:
        super().__init__(torch.zeros_like)

    def __call__(
        self, rewards: torch.Tensor, *others: Any, **more: Any
    ) -> tuple[torch.Tensor, dict[str, float]]:
        return torch.zeros_like(rewards), {}


class CurveAdvantage(GroupAdvantage):
    """CurveRL (2605.24331): reward minus the question's mean, times the weight f / F of that mean.

    Over the questions of the last 10 steps, f is the share with this mean reward and F the share
    with at most it, in G + 1 bins from 0 to 1. The first step counts its own questions. Questions
    with all rewards 0 or all 1 are not counted and get 0. The weight is not normalised; it is 0 if
    no counted question has such a mean. ValueError for rewards outside [0, 1].
    """

    def __init__(self) -> None:
        super().__init__(self.weighted)
        self.window: list[list[float]] = []  # of each step, the means that count

    def weighted(self, r: torch.Tensor) -> torch.Tensor:
        if not (r.min() >= 0 and r.max() <= 1):
            raise ValueError(
                f"curverl: got rewards from {float(r.min())} to {float(r.max())}; expected them in "
                "[0, 1], of which a mean is a pass rate. Scale them or choose another algorithm."
            )
        mean, bins = r.mean(1), r.shape[1] + 1
        counts = (mean > 0) & (mean < 1)
        mine = mean[counts]
        known = torch.tensor([x for one in self.window for x in one], dtype=mean.dtype)
        reference = known if len(known) else mine.cpu()
        share = torch.bincount((reference * bins).long(), minlength=bins) / max(len(reference), 1)
        weight = torch.where(share > 0, share / share.cumsum(0), 0.0).to(mean)
        chosen = torch.where(counts, weight[(mean * bins).long().clamp(max=bins - 1)], 0.0)
        self.window = [*self.window, mine.tolist()][-CURVE_STEPS:]
        return minus_mean(r) * chosen[:, None]

    def state_dict(self) -> dict[str, Any]:
        return {"window": [list(one) for one in self.window]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window = [list(one) for one in state["window"]]


def by_question(x: torch.Tensor, question_id: Sequence[str]) -> torch.Tensor:
    """[R] -> [Q, G]; ValueError unless rows are question-major with G of each question."""
    responses = next((i for i, q in enumerate(question_id) if q != question_id[0]), len(x))
    names = list(question_id[::responses])
    rows = [name for name in names for _ in range(responses)]
    if rows != list(question_id) or len(set(names)) < len(names):
        raise ValueError(
            f"by_question: got {len(x)} rows of {len(set(question_id))} questions; expected "
            "question-major rows with the same number of responses each. Sort them by question."
        )
    return x.view(-1, responses)
