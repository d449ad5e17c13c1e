"""RiskPOConfig: TRL's GRPOConfig, the settings of the bundles, and what may be combined."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from riskpo_kernels import RiskPOAdvantage

OP = "RiskPOConfig"
# loss_type of TRL -> aggregate of riskpo_kernels.clipped_surrogate
AGGREGATES = {
    "grpo": "sequence-mean",
    "dapo": "token-mean",
    "dr_grpo": "sequence-sum-norm",
    "cispo": "token-mean",
    "sapo": "sequence-mean",
}
OF_TOKENS = ("cispo", "sapo")  # losses of token ratios, without delta's second clip


def _override(text: str) -> Any:
    return field(default=None, metadata={"help": f"{text} Unset: the preset's."})


@dataclass
class RiskPOConfig(GRPOConfig):
    """GRPOConfig with RiskPO's defaults, and riskpo_* fields.

    Changed defaults, the paper's loss (arXiv 2510.00911): importance_sampling_level="sequence",
    epsilon=3e-4, epsilon_high=4e-4, loss_type="grpo" (one term per sequence, then their mean),
    scale_rewards="none" (bundles take rewards as they are) and use_bias_correction_kl=False.

    riskpo_preset and the overrides from riskpo_form to riskpo_leftover are those of
    riskpo_kernels.RiskPOAdvantage; riskpo_seed, of the pairing, is `seed` unless set. `beta` stays
    TRL's coefficient of the KL term; the upper quantile's level is riskpo_beta.

    ValueError where the questions of a generation batch do not fill bundles, and for settings of
    GRPOConfig that this trainer does not implement or that would change rewards before bundling.
    """

    importance_sampling_level: str = "sequence"
    epsilon: float = 3e-4
    epsilon_high: float | None = 4e-4
    loss_type: str = "grpo"
    scale_rewards: str = "none"
    use_bias_correction_kl: bool = False

    riskpo_preset: str = field(
        default="paper", metadata={"help": "paper, matched, official-easy or official-hard."}
    )
    riskpo_form: str | None = _override("paper, official, seeking or mean.")
    riskpo_alpha: float | None = _override("Level of the lower quantile.")
    riskpo_beta: float | None = _override("Level of the upper quantile.")
    riskpo_omega: float | None = _override("Extra weight of the tail.")
    riskpo_w_mix: float | None = _override("Mixing weight of the official forms.")
    riskpo_eps: float | None = _override("Beside the official code's divisors.")
    riskpo_bundle_size: int | None = _override("Questions per bundle.")
    riskpo_quantiles: str | None = _override("tracked, bundle or mix.")
    riskpo_tracker_step: float | None = _override("Step of the tracked quantiles, in scores.")
    riskpo_credit: str | None = _override("uniform, score, std, sum-mean or conditional.")
    riskpo_bundling: str | None = _override("random or matched: questions of like difficulty.")
    riskpo_difficulty: str | None = _override("Of matched bundles: history, prior or cross-fit.")
    riskpo_history_rate: float | None = _override("Of the mean of a question's rewards.")
    riskpo_baseline: str | None = _override("natural, none, leave-one-out or batch.")
    riskpo_scale: str | None = _override("none, bundle-std or batch-std.")
    riskpo_std_floor: float | None = _override("Smallest divisor of batch-std.")
    riskpo_pairing: str | None = _override("permuted or index.")
    riskpo_leftover: str | None = _override("error or drop.")
    riskpo_seed: int | None = field(
        default=None, metadata={"help": "Of the pairing. Unset: the run's seed."}
    )
    riskpo_question_column: str | None = field(
        default=None,
        metadata={"help": "Column that names the question. Unset: the content of the row."},
    )
    riskpo_prior_column: str | None = field(
        default=None,
        metadata={"help": "Number, larger for easier questions, of riskpo_difficulty='prior'."},
    )
    riskpo_head: bool = field(
        default=True, metadata={"help": "Log-probs by linear_logprob; False: by TRL's own head."}
    )
    riskpo_backend: str = field(
        default="auto", metadata={"help": "Of the ops: auto, triton, torch or reference."}
    )
    riskpo_memory_mib: float = field(default=300, metadata={"help": "Workspace of the head."})
    riskpo_tail_eps: float | None = field(
        default=None, metadata={"help": "Gradient blocks dropped below it; see linear_logprob."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse(self)
        _check_bundles(self)

    def surrogate(self) -> dict[str, Any]:
        """clipped_surrogate's loss and settings that loss_type and its bounds name in TRL."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo":  # TRL's epsilon_high is the largest ratio itself
            return {"loss": "cispo", "loss_options": {"clip_low": 1.0, "clip_high": high - 1}}
        if self.loss_type == "sapo":
            tau = {"tau_pos": self.sapo_temperature_pos, "tau_neg": self.sapo_temperature_neg}
            return {"loss": "sapo", "loss_options": tau}
        return {"clip_low": self.epsilon, "clip_high": high, "dual_clip": self.delta}

    def overrides(self) -> dict[str, Any]:
        """The settings of RiskPOAdvantage that replace the preset's."""
        given = {n: getattr(self, f"riskpo_{n}") for n in vars(RiskPOAdvantage().settings)}
        return {"seed": self.seed} | {n: x for n, x in given.items() if x is not None}

    def advantage(self) -> RiskPOAdvantage:
        """A new RiskPOAdvantage with these settings; ValueError as it raises."""
        return RiskPOAdvantage(self.riskpo_preset, **self.overrides())


def _refuse(c: RiskPOConfig) -> None:
    """Settings that would be ignored, or would mean something else here."""
    delta_floor = 1 + (c.epsilon if c.epsilon_high is None else c.epsilon_high)
    refused = (
        ("loss_type", c.loss_type not in AGGREGATES, f"one of {list(AGGREGATES)}"),
        (
            "importance_sampling_level",
            c.importance_sampling_level not in ("sequence", "token")
            or (c.loss_type in OF_TOKENS and c.importance_sampling_level != "token"),
            "'sequence' or 'token', and 'token' with cispo or sapo",
        ),
        ("scale_rewards", c.scale_rewards != "none", "'none'; riskpo_scale divides the advantage"),
        (
            "multi_objective_aggregation",
            c.multi_objective_aggregation != "sum_then_normalize",
            "'sum_then_normalize', as bundles sum rewards that nothing has normalised",
        ),
        (
            "delta",
            c.delta is not None and (c.delta <= delta_floor or c.loss_type in OF_TOKENS),
            f"above {delta_floor}, or None (with cispo and sapo always)",
        ),
        (
            "use_bias_correction_kl",
            c.beta != 0 and c.use_bias_correction_kl and c.importance_sampling_level != "token",
            "False, or importance_sampling_level='token', whose ratio makes it unbiased",
        ),
        ("top_entropy_quantile", c.top_entropy_quantile < 1, "1.0"),
        ("use_adaptive_entropy", c.use_adaptive_entropy, "False; entropy_coef is available"),
        ("use_liger_kernel", c.use_liger_kernel, "False; model_init_kwargs={'use_kernels': True}"),
    )
    for name, bad, expected in refused:
        if bad:
            raise ValueError(
                f"{OP}: got {name}={getattr(c, name)!r}; expected {expected}. "
                "RiskPO's loss does not implement anything else."
            )


def _check_bundles(c: RiskPOConfig) -> None:
    settings = c.advantage().settings
    assert c.generation_batch_size and c.num_generations  # GRPOConfig has filled them in
    column = c.riskpo_prior_column
    if (settings.difficulty == "prior") != (column is not None):
        raise ValueError(
            f"{OP}: got riskpo_difficulty={settings.difficulty!r} with riskpo_prior_column="
            f"{column!r}; expected 'prior' and the column that holds it, or neither."
        )
    questions, per = c.generation_batch_size // c.num_generations, settings.bundle_size
    if questions < per or (questions % per and settings.leftover == "error"):
        raise ValueError(
            f"{OP}: got {questions} questions per generation batch (generation_batch_size "
            f"{c.generation_batch_size}, num_generations {c.num_generations}); expected a multiple "
            f"of riskpo_bundle_size={per}. Raise gradient_accumulation_steps or "
            f"steps_per_generation until generation_batch_size is a multiple of "
            f"{per * c.num_generations}, or set a smaller riskpo_bundle_size."
        )
