"""Are the verdicts and the samples of a run to be trusted? A part of `riskpo explain`."""

from __future__ import annotations

from collections.abc import Iterable

from riskpo.algorithms import find_strategy
from riskpo.report.findings import Finding, Log

LOST_VERDICTS = 0.01  # share of verdicts that were a timeout, a crash or an unreadable gold
TRUNCATED = 0.2
MISMATCH_KL = 1e-3  # nats per token between sampler and trainer
SMALL_SAMPLE = 0.5  # share of the sample that the correction's weights leave
CAPPED = 0.05  # share of the correction's weights that the cap changed


def verdicts(log: Log) -> Iterable[Finding]:
    lost = {n: log.total(f"outcome_{n}") for n in ("timeout", "crash", "unparsable_gold")}
    every = sum(log.total(k) for k in {k for r in log.steps for k in r if k.startswith("outcome_")})
    if not every:
        return
    share = sum(lost.values()) / every
    named = ", ".join(f"{int(n)} {name.replace('_', ' ')}" for name, n in lost.items() if n)
    text = f"{every:.0f} verdicts; " + (
        f"{named}: {share:.1%} of the rewards are 0 for a reason that is not the answer."
        if named
        else "no timeout, no crash, no unreadable gold."
    )
    yield Finding(text, share > LOST_VERDICTS)
    silent = log.total("outcome_no_answer") / every
    if silent > TRUNCATED:
        yield Finding(f"{silent:.0%} of the responses held no answer at all.", True)


def sampler(log: Log) -> Iterable[Finding]:
    cut = log.late("truncated_fraction")
    if cut is not None:
        limit = log.config.max_response_tokens
        more = " Raise it, or the reward measures length." if cut > TRUNCATED else ""
        overlong = find_strategy(log.config.algorithm).overlong
        if overlong:
            more += f" {log.config.algorithm} takes up to 1 off the reward of a response in the "
            more += f"last {overlong:.0%} of that length, and 1 where it was cut."
        yield Finding(
            f"{cut:.1%} of the late responses were cut at max_response_tokens = {limit}.{more}",
            cut > TRUNCATED,
        )
    ratios = [r["sampler_ratio_max"] for r in log.steps if "sampler_ratio_max" in r]
    yield from _mismatch(log, ratios)
    yield from _correction(log, ratios)


def _mismatch(log: Log, ratios: list[float]) -> Iterable[Finding]:
    """How far the sampler's log-probs are from the trainer's."""
    kl = log.mean("sampler_kl")
    # With several updates the trainer's log-probs are those before the first, as the ratios' are; a
    # log without ratios may hold what the updates themselves changed.
    if kl is None or log.config.updates_per_step > 1 and not ratios:
        return
    off = kl > MISMATCH_KL
    unit = "response" if log.config.sampler.level == "sequence" else "token"
    yield Finding(
        f"Sampler and trainer differ by a KL of {kl:.1e} nats per token"
        + (f", and by at most a factor of {max(ratios):.6g} in a {unit}" if ratios else "")
        + (": they are not the same policy." if off else ": rounding."),
        off,
    )


def _correction(log: Log, ratios: list[float]) -> Iterable[Finding]:
    """What the weights of TIS or MIS left of the sample."""
    settings = log.config.sampler
    ess = log.mean("sampler_ess")
    if ess is not None:
        few = ess < SMALL_SAMPLE
        yield Finding(
            f"The {settings.correction.upper()} weights leave {ess:.1%} of the sample (effective "
            "sample size)" + ("; the gradient rests on few of its terms." if few else "."),
            few,
        )
    unit = "responses" if settings.level == "sequence" else "tokens"
    fates = {"sampler_truncated": "truncated to it", "sampler_masked": "masked: they teach nothing"}
    for name, fate in fates.items():
        share = log.mean(name)
        if share is None:
            continue
        yield Finding(
            f"{share:.1%} of the {unit} had a weight above sampler.cap = {settings.cap:g} (the "
            f"largest {max(ratios):.3g}) and were {fate}.",
            share > CAPPED,
        )
