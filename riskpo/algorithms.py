"""The algorithms, one row each.

A row says how rewards become advantages, which questions are kept, and how the loss treats ratio,
clipping and averaging. Two algorithms differ in their rows and nowhere else. Q questions, G
responses each, R = Q * G rollouts, question-major.

Sources of the numbers: arXiv 2510.00911 (RiskPO), 2402.03300 (GRPO), 2503.14476 (DAPO), 2503.20783
(Dr. GRPO), 2507.18071 (GSPO); RLOO, MaxRL and RS-GRPO at their formulas; the losses of CISPO, SAPO,
GMPO and IcePop in riskpo_kernels/policy_loss/formulas.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from riskpo.config import TrainConfig, nearest
from riskpo.group_advantages import (
    Advantage,
    CurveAdvantage,
    GroupAdvantage,
    NoAdvantage,
    check_responses,
    difficulty_weighted,
    minus_mean,
    minus_others,
    over_mean,
    over_std,
    risk_seeking,
)
from riskpo_kernels import RiskPOAdvantage, clipped_surrogate

# Settings that RiskPOAdvantage and the config share. The seed belongs to every algorithm.
RISK_SETTINGS = vars(RiskPOAdvantage().settings).keys() & vars(TrainConfig()).keys() - {"seed"}


@dataclass(frozen=True)
class LossOptions:
    """Keyword arguments of riskpo_kernels.clipped_surrogate; None means its default."""

    ratio: str = "sequence"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    aggregate: str = "sequence-mean"
    constant: float | None = None  # tokens, of aggregate="sequence-sum-norm"
    loss: str = "clip"
    loss_options: dict[str, float] | None = None
    off_policy_mask_threshold: float | None = None  # nats


def keep_all(rewards_QG: torch.Tensor) -> torch.Tensor:
    """Keep every question: bool [Q], all True."""
    return torch.ones(len(rewards_QG), dtype=torch.bool)


def keep_mixed(rewards_QG: torch.Tensor) -> torch.Tensor:
    """Keep the questions whose responses differ in reward: bool [Q]."""
    return (rewards_QG != rewards_QG[:, :1]).any(1)


def risk(preset: str, **row: Any) -> Callable[[TrainConfig], Advantage]:
    """A factory of RiskPOAdvantage. The row overrides the preset, the config overrides both."""

    def build(config: TrainConfig) -> Advantage:
        given = {k: getattr(config, k) for k in RISK_SETTINGS if getattr(config, k) is not None}
        advantage = RiskPOAdvantage(preset, seed=config.seed, **{**row, **given})
        if advantage.settings.compares_responses:
            check_responses(f"algorithm={config.algorithm!r}", config.responses_per_question)
        size = advantage.settings.bundle_size
        if config.questions_per_step % size:
            raise ValueError(
                f"config: got questions_per_step={config.questions_per_step} with "
                f"bundle_size={size}; expected a multiple. Change one of them."
            )
        return advantage

    return build


def group(formula: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[TrainConfig], Advantage]:
    """A factory of GroupAdvantage."""
    return of_groups(lambda: GroupAdvantage(formula))


def of_groups(
    make: Callable[[], Advantage], *, alone: bool = False
) -> Callable[[TrainConfig], Advantage]:
    """A factory of an advantage without bundles; `alone`: one that compares no responses."""

    def build(config: TrainConfig) -> Advantage:
        useless = sorted(k for k in RISK_SETTINGS if getattr(config, k) is not None)
        if useless:
            raise ValueError(
                f"config: got {', '.join(useless)} with algorithm={config.algorithm!r}; expected "
                "none of them, since its advantage has no bundles. Remove them or choose a bundled "
                "algorithm."
            )
        if not alone:
            check_responses(f"algorithm={config.algorithm!r}", config.responses_per_question)
        return make()

    return build


@dataclass(frozen=True)
class Strategy:
    """One algorithm.

    overlong is the last share of max_response_tokens in which a response is penalised for its
    length (`overlong_penalty`); 0: no penalty.
    """

    advantage: Callable[[TrainConfig], Advantage]
    keep: Callable[[torch.Tensor], torch.Tensor] = keep_all
    loss: LossOptions = field(default_factory=LossOptions)
    overlong: float = 0.0


TOKEN = LossOptions(ratio="token", clip_low=0.2, clip_high=0.2)
PAPER = LossOptions(ratio="sequence", clip_low=3e-4, clip_high=4e-4)
OFFICIAL = replace(TOKEN, dual_clip=3.0, aggregate="token-mean")
DAPO = replace(TOKEN, clip_high=0.28, aggregate="token-mean")
DR_GRPO = replace(TOKEN, aggregate="sequence-sum-norm")
PROMPT_MEAN = replace(TOKEN, clip_high=0.28, aggregate="prompt-mean")
OFF_POLICY_MASK = replace(TOKEN, off_policy_mask_threshold=0.5)
OVER_TOKENS = LossOptions("token", aggregate="token-mean")


def paper(**row: Any) -> Strategy:
    """RiskPO's row as published, with these settings of its advantage changed."""
    return Strategy(risk("paper", **row), loss=PAPER)


# With the paper's baseline every advantage is <= 0: each sample is pushed down, bad ones harder.
# The rows -loo, -batch and -none change the baseline alone. Further controls are settings of these
# rows: --omega 0, --beta 1, --bundle-size 1.
STRATEGIES: dict[str, Strategy] = {
    "riskpo-paper": paper(),
    "riskpo-loo": paper(baseline="leave-one-out"),
    "riskpo-batch": paper(baseline="batch"),
    "riskpo-none": paper(baseline="none"),
    "riskpo-official-easy": Strategy(risk("official-easy"), loss=OFFICIAL),
    "riskpo-official-hard": Strategy(risk("official-hard"), loss=OFFICIAL),
    "riskpo-seeking": paper(form="seeking"),
    "riskpo-seeking-loo": paper(form="seeking", baseline="leave-one-out"),
    "bundle-mean": paper(form="mean"),
    # Not the authors': see docs/risk.md.
    "riskpo-conditional": paper(baseline="leave-one-out", credit="conditional"),
    "riskpo-matched": Strategy(risk("matched"), loss=PAPER),
    "difficulty-weighted": Strategy(group(difficulty_weighted), loss=PAPER),
    "grpo": Strategy(group(over_std), loss=TOKEN),
    "dr-grpo": Strategy(group(minus_mean), loss=DR_GRPO),
    "rloo": Strategy(group(minus_others), loss=TOKEN),
    "maxrl": Strategy(group(over_mean), loss=TOKEN),
    "rs-grpo": Strategy(group(risk_seeking), loss=TOKEN),
    "curverl": Strategy(of_groups(CurveAdvantage), loss=TOKEN),
    "gspo": Strategy(group(over_std), loss=PAPER),
    "dapo": Strategy(group(over_std), keep=keep_mixed, loss=DAPO, overlong=0.2),
    "cispo": Strategy(group(over_std), loss=replace(OVER_TOKENS, loss="cispo")),
    "icepop": Strategy(group(over_std), loss=replace(OVER_TOKENS, loss="icepop")),
    "sapo": Strategy(group(over_std), loss=LossOptions("token", loss="sapo")),
    "gmpo": Strategy(group(over_std), loss=LossOptions("sequence", loss="gmpo")),
    # DeepSeek-V3.2 (2512.02556): no std. Sequences with a negative advantage are masked once the
    # policy has moved away from them, which takes several updates a batch. TRL's threshold.
    "off-policy-mask": Strategy(group(minus_mean), loss=OFF_POLICY_MASK),
    "prompt-mean": Strategy(group(over_std), loss=PROMPT_MEAN),  # ScaleRL (2510.13786)
    # On-policy distillation (2306.13649, 2306.08543): the student samples, and the loss is its
    # divergence from the teacher over the whole vocabulary at each token; riskpo/model/teacher.py.
    "distill": Strategy(of_groups(NoAdvantage, alone=True), loss=OVER_TOKENS),
}


def find_strategy(name: str) -> Strategy:
    """The row of that name; ValueError suggests the most similar name."""
    if name not in STRATEGIES:
        raise ValueError(
            f"algorithm: got {name!r}; expected one of {', '.join(STRATEGIES)}. "
            + nearest(name, STRATEGIES, "Check the spelling.")
        )
    return STRATEGIES[name]


def loss_options(strategy: Strategy, config: TrainConfig) -> LossOptions:
    """The row's loss, with the config's clip bounds in place of its own if set.

    ValueError if the loss has no such bound; the loss is called once, on one token, to find out.
    """
    given = {k: getattr(config, k) for k in ("clip_low", "clip_high")}
    given = {k: v for k, v in given.items() if v is not None}
    if strategy.loss.aggregate == "sequence-sum-norm":
        given["constant"] = float(config.max_response_tokens or 1)
    options = replace(strategy.loss, **given)
    one, bounds = torch.zeros(1), torch.tensor([0, 1])
    clipped_surrogate(one, one, one, cu_seqlens=bounds, prompt_tokens=one + 1, **asdict(options))
    return options


def overlong_penalty(length: int, max_tokens: int, buffer_tokens: int) -> float:
    """DAPO's soft overlong punishment, in [-1, 0]; lengths in tokens.

    0 up to max_tokens - buffer_tokens, then falling linearly to -1 at max_tokens.
    """
    if buffer_tokens <= 0:
        return 0.0
    return -min(max((length - (max_tokens - buffer_tokens)) / buffer_tokens, 0.0), 1.0)
