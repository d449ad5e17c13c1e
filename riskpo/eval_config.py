"""Settings of `riskpo eval`."""

from __future__ import annotations

from dataclasses import dataclass, field

from riskpo.config import (
    ColumnsConfig,
    Count,
    CountOr0,
    Dtype,
    NumberOr0,
    check_columns,
    check_types,
    reject,
)

VERIFIER_SECONDS = 5.0  # per answer


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `riskpo eval`: avg@k, pass@k and maj@k of a model or of a checkpoint folder."""

    # folder or hub name; a run_dir stands for its newest checkpoint; {seed} for each of the seeds
    model: str = "runs/demo"
    data: str | None = None  # as of `riskpo train`; of an embedded task the held-out questions
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    reward: str = "auto"
    questions: Count = 200
    samples: Count = 8
    ks: tuple[int, ...] = ()  # of pass@k and maj@k; none: 1 and samples
    temperature: NumberOr0 = 1.0  # 0: greedy
    max_prompt_tokens: Count = 512
    max_response_tokens: Count | None = None  # None: 8 for the embedded task, else 1024
    sample_sequences: Count = 512
    dtype: Dtype = "float32"
    seed: CountOr0 = 0
    seeds: tuple[CountOr0, ...] = ()  # repeat with these, and give an interval over them too
    out: str | None = None  # write the result, with every question's texts and rewards, as JSON

    def validate(self) -> None:
        """ValueError on anything that cannot be evaluated."""
        check_types(self)
        if any(not 1 <= k <= self.samples for k in self.ks) or len({*self.ks}) < len(self.ks):
            reject(
                f"ks={list(self.ks)} with samples={self.samples}",
                "different numbers from 1 to samples",
                "Draw more samples or ask for smaller k.",
            )
        if len({*self.seeds}) < len(self.seeds):
            reject(f"seeds={list(self.seeds)}", "different numbers", "Set seeds.")
        check_columns(self.columns)
