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
    """Settings of `riskpo eval`, which measures avg@n, pass@k and maj@k of a model."""

    # folder, GGUF file or hub name; a run_dir means its newest checkpoint; {seed}: see --seeds
    model: str = "runs/demo"
    data: str | None = None  # file or hub name; None or embedded:...: the task's held-out questions
    split: str | None = None  # of a hub data set; None: train, which `riskpo train` reads too
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    reward: str = "auto"  # auto, math, code, exact, your "module:function" or "file.py:function"
    questions: Count = 200  # the first so many; of an embedded task, those that a run holds out
    samples: Count = 8  # responses per question: the n of avg@n
    ks: tuple[int, ...] = ()  # the k of pass@k and maj@k, each at most samples; none: 1 and samples
    temperature: NumberOr0 = 1.0  # 0: greedy
    max_prompt_tokens: Count = 512  # a longer prompt is an error
    max_response_tokens: Count | None = None  # None: 1024, or 8 for an embedded task
    sample_sequences: Count = 512  # responses sampled at once
    dtype: Dtype = "float32"  # of the weights
    seed: CountOr0 = 0  # of sampling; with an embedded task, of the held-out questions too
    # evaluate once per seed and add an interval over seeds; {seed} in model names a run for each
    seeds: tuple[CountOr0, ...] = ()
    out: str | None = None  # JSON file for the results, with every question's texts and rewards

    def validate(self) -> None:
        """ValueError for settings that cannot be evaluated."""
        check_types(self)
        if any(not 1 <= k <= self.samples for k in self.ks) or len({*self.ks}) < len(self.ks):
            reject(
                f"ks={list(self.ks)} with samples={self.samples}",
                "different numbers from 1 to samples",
                "Draw more samples or ask for smaller k.",
            )
        if len({*self.seeds}) < len(self.seeds):
            reject(f"seeds={list(self.seeds)}", "different numbers", "Remove the repeated ones.")
        check_columns(self.columns)
