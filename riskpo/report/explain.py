"""`riskpo explain RUN_DIR`: why a run learns or does not, in sentences with their numbers.

It reads the run's log and settings and loads no model. "Early" and "late" are the first and the
last fifth of the steps. "!" marks a sentence about a possible problem; the others rule a common
problem out or say what a number means. A number that the log lacks gives no sentence.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from riskpo.config import read_toml
from riskpo.files import SETTINGS
from riskpo.report.explain_samples import sampler, verdicts
from riskpo.report.explain_trends import moved, tracker
from riskpo.report.findings import Finding, Log
from riskpo.report.logs import average_name, read_records

NO_SIGNAL = 0.5  # a larger share of responses with advantage 0 is notable
SMALL_LOSS = 0.02  # of the order of the noise of a mean advantage
LITTLE_GRADIENT = 1e-6
COLLAPSED = 0.2  # of the early entropy
WIDTH = 100  # columns of the printed report


def explain(run_dir: str | Path) -> list[Finding]:
    """What the log of `run_dir` says; ValueError where there is no log or no step in it."""
    steps = read_records(run_dir, "step")
    if not steps:
        raise ValueError(
            f"explain: {run_dir} has no finished step. Train it for at least one step first."
        )
    log = Log(steps, read_records(run_dir, "eval"), read_toml(Path(run_dir) / SETTINGS))
    return [replace(f, topic=topic) for topic, ask in QUESTIONS.items() for f in ask(log)]


def report(run_dir: str | Path) -> str:
    """`explain`'s sentences under their topics, at most WIDTH wide; "!" marks notable ones."""
    lines: list[str] = []
    topic = ""
    for finding in explain(run_dir):
        if finding.topic != topic:
            topic = finding.topic
            lines.append(f"{topic}:")
        mark = f"  {'!' if finding.notable else ' '} "
        lines += textwrap.wrap(
            finding.text, WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark),
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


def progress(log: Log) -> Iterable[Finding]:
    first, last = log.early("reward_mean"), log.late("reward_mean")
    change = log.change("reward_mean")
    if first is not None and last is not None:
        real = change is None or change.moved
        yield Finding(
            f"{log.config.algorithm}, {len(log.steps)} steps: mean reward {first:.3f} early, "
            f"{last:.3f} late{'' if real else ', within the noise of the steps'}.",
            last < first and change is not None and change.moved,
        )
    name = average_name(log.evals)
    if name is not None and len(log.evals) > 1:
        before, after = log.evals[0][name], log.evals[-1][name]
        yield Finding(f"Held-out {name} went from {before:.3f} to {after:.3f}.")


def signal(log: Log) -> Iterable[Finding]:
    """Which responses can teach anything at all."""
    wrong, right = log.mean("all_wrong_fraction"), log.mean("all_right_fraction")
    if wrong is not None and right is not None:
        yield Finding(
            f"Of the sampled questions {wrong:.0%} had only wrong responses and {right:.0%} only "
            f"right ones: {wrong + right:.0%} of the groups are all-equal, and comparing their "
            "responses with each other says nothing.",
            wrong + right > NO_SIGNAL,
        )
    zero = log.mean("zero_advantage_fraction")
    if zero is not None:
        cure = " Easier or more mixed questions, or more responses each, would help."
        yield Finding(
            f"{zero:.0%} of the responses that were learned from had advantage 0 and no gradient."
            + (cure if zero > NO_SIGNAL else ""),
            zero > NO_SIGNAL,
        )
    highest = [r["advantage_max"] for r in log.steps if "advantage_max" in r]
    if highest and max(highest) <= 0:
        lowest = min(r["advantage_min"] for r in log.steps if "advantage_min" in r)
        yield Finding(
            f"Every advantage lay in [{lowest:.2f}, 0]: responses are pushed down or left alone, "
            "never up, as the natural baseline has it; the probability they lose goes anywhere. A "
            "centring baseline, such as 'leave-one-out', keeps the differences and drops the push.",
            True,
        )
    q_beta = log.late("q_beta")
    if q_beta is not None and q_beta <= 1e-9 and log.config.questions_per_step > 0:
        yield Finding(
            f"The upper quantile of the bundle scores stands at {q_beta:.2f}: at or above it the "
            "averse advantage is constant, so that right answers count for nothing. Larger "
            "bundles or easier questions lift it.",
            True,
        )
    sampled = log.mean("sampled_questions")
    if sampled is not None and sampled > 1.01 * log.config.questions_per_step:
        yield Finding(
            f"Dynamic sampling drew {sampled:.0f} questions a step to learn from at most "
            f"{log.config.questions_per_step}: compare at equal responses, not at equal steps."
        )


def loss(log: Log) -> Iterable[Finding]:
    """A loss near zero is what it should be, and no sign of a missing gradient."""
    sizes, norm = [abs(r["loss"]) for r in log.steps if "loss" in r], log.mean("grad_norm")
    if not sizes or norm is None:
        return
    size = fmean(sizes)
    if norm < LITTLE_GRADIENT:
        text = f"The gradient norm is {norm:.1e} on average: nothing is learned. See the signal."
        yield Finding(text, True)
    elif size < SMALL_LOSS:
        ratio = (
            "With one update per batch every ratio is exactly 1"
            if log.config.updates_per_step == 1
            else f"Ratios stay near 1 (mean {log.mean('ratio_mean') or 1.0:.4f})"
        )
        yield Finding(
            f"|loss| is {size:.4f} on average, and that is no fault. {ratio}, so the loss is minus "
            f"the mean of the advantages, and these are centred; its gradient is not zero (norm "
            f"{norm:.2g})."
        )
    else:
        yield Finding(
            f"|loss| is {size:.3f} on average: the advantages do not have mean zero, or ratios "
            f"have moved away from 1. The gradient norm is {norm:.2g}."
        )
    above = [r["grad_norm"] > log.config.max_grad_norm for r in log.steps if "grad_norm" in r]
    if above and sum(above) > len(above) / 2:
        yield Finding(
            f"The gradient was shortened to max_grad_norm = {log.config.max_grad_norm:g} in "
            f"{sum(above) / len(above):.0%} of the steps: only its direction counts there."
        )


def clipping(log: Log) -> Iterable[Finding]:
    clipped = log.mean("clip_fraction")
    if clipped is None:
        return
    low, high = log.mean("clip_low_fraction") or 0.0, log.mean("clip_high_fraction") or 0.0
    if log.config.updates_per_step == 1:
        yield Finding(
            f"It cannot: with updates_per_step = 1 every ratio is 1 (clipped: {clipped:.1%})."
        )
        return
    text = f"{clipped:.1%} of the ratios were clipped ({low:.1%} at the lower, {high:.1%} at the "
    if clipped > 0.3:
        text += "upper bound): most of the off-policy updates are thrown away. Widen the bounds, "
        text += "lower the learning rate or take fewer updates per batch."
    else:
        text += "upper bound)."
    yield Finding(text, clipped > 0.3)


def entropy(log: Log) -> Iterable[Finding]:
    name = "sampled_entropy" if log.mean("sampled_entropy") is not None else "entropy"
    first, last = log.early(name), log.late(name)
    if first is None or last is None:
        return
    collapsed = last < COLLAPSED * first
    text = f"Token entropy went from {first:.3f} to {last:.3f} nats"
    text += ": it has collapsed, and few new answers are tried." if collapsed else "."
    yield Finding(text, collapsed)


def updates(log: Log) -> Iterable[Finding]:
    skipped = [r["skipped_updates"] for r in log.steps if "skipped_updates" in r]
    if skipped:
        count = max(skipped)
        why = "loss or gradient were not finite; look for the warning in the output."
        yield Finding(
            f"{count:.0f} were skipped: {why}" if count else "None was skipped.", count > 0
        )
    empty = sum("loss" not in r for r in log.steps)
    if empty:
        yield Finding(f"{empty} steps kept no question and made no update.", True)
    odd = sum(not math.isfinite(r.get("reward_mean", 0.0)) for r in log.steps)
    if odd:
        yield Finding(f"{odd} steps have a mean reward that is not a number.", True)


QUESTIONS: dict[str, Callable[[Log], Iterable[Finding]]] = {
    "What happened": progress,
    "Is there a signal": signal,
    "Is the loss near zero, and why": loss,
    "Does clipping act": clipping,
    "Does the policy still explore": entropy,
    "Does the quantile tracker keep up": tracker,
    "Did the verifier answer": verdicts,
    "Are the samples sound": sampler,
    "Were updates lost": updates,
    "Which counters moved": moved,
}
