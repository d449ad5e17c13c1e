"""Settings of `riskpo eval`."""

from __future__ import annotations

from dataclasses import dataclass, field

from riskpo.config import DTYPES, ColumnsConfig, check_columns, reject

VERIFIER_SECONDS = 5.0  # per answer


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `riskpo eval`: avg@k, pass@k and maj@k of a model or of a checkpoint folder."""

    # folder or hub name; a run_dir stands for its newest checkpoint; {seed} for each of the seeds
    model: str = "runs/demo"
    data: str | None = None  # as of `riskpo train`; of an embedded task the held-out questions
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    reward: str = "auto"
    questions: int = 200
    samples: int = 8
    ks: tuple[int, ...] = ()  # of pass@k and maj@k; none: 1 and samples
    temperature: float = 1.0  # 0: greedy
    max_prompt_tokens: int = 512
    max_response_tokens: int | None = None  # None: 8 for the embedded task, else 1024
    sample_sequences: int = 512
    dtype: str = "float32"
    seed: int = 0
    seeds: tuple[int, ...] = ()  # repeat with these, and give an interval over them too
    out: str | None = None  # write the result, with every question's texts and rewards, as JSON

    def validate(self) -> None:
        """ValueError on anything that cannot be evaluated."""
        least = {
            "questions": 1, "samples": 1, "max_prompt_tokens": 1, "sample_sequences": 1, "seed": 0,
        }  # fmt: skip
        if self.max_response_tokens is not None:
            least["max_response_tokens"] = 1
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                reject(f"{name}={getattr(self, name)}", f"at least {smallest}", f"Set {name}.")
        if not 0 <= self.temperature < float("inf"):
            reject(f"temperature={self.temperature}", "0 (greedy) or above", "Set temperature.")
        if any(not 1 <= k <= self.samples for k in self.ks) or len({*self.ks}) < len(self.ks):
            reject(
                f"ks={list(self.ks)} with samples={self.samples}",
                "different numbers from 1 to samples",
                "Draw more samples or ask for smaller k.",
            )
        if min(self.seeds, default=0) < 0 or len({*self.seeds}) < len(self.seeds):
            reject(f"seeds={list(self.seeds)}", "different numbers from 0", "Set seeds.")
        if self.dtype not in DTYPES:
            reject(f"dtype={self.dtype!r}", f"one of {', '.join(DTYPES)}", "Check the spelling.")
        check_columns(self.columns)
