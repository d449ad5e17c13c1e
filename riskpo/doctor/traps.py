"""Traps: inputs on which fused heads have been wrong before, run on any log-prob function.

A trap returns whether the function passes, with its error and the limit; or the exception it
raised; or that it does not offer the feature. The truth is float64. The limit is twice the error of
plain PyTorch with float32 logits in the same dtype, unless the trap checks an identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from riskpo.doctor.libraries import Op, plain_op
from riskpo.doctor.packages import first_line
from riskpo.doctor.seen import (
    Seen,
    against_plain,
    bounded,
    coefficients,
    exact_plain,
    gradients,
    rows,
)
from riskpo.doctor.tolerance import bounds as rule
from riskpo.doctor.tolerance import errors


@dataclass(frozen=True)
class Trap:
    """origin: a thread on GitHub where it was met, or ""."""

    name: str
    origin: str
    pose: Callable[[Op], Seen]


def ragged_vocabulary(op: Op) -> Seen:
    return against_plain(op, *rows(37, 64, 1009), coefficients(37))


def small_vocabulary(op: Op) -> Seen:
    return against_plain(op, *rows(9, 64, 7), coefficients(9))


def deep_rows(op: Op) -> Seen:
    """All logits of every row near -1e4: a maximum seeded with 0 gives -inf."""
    h, w, t = rows(16, 63, 512)
    h = torch.cat([h, torch.full((16, 1), 100.0)], 1)
    w = torch.cat([w, torch.full((512, 1), -100.0)], 1)
    # the common offset itself costs digits: compare with plain PyTorch's own loss of them
    return against_plain(op, h, w, t, coefficients(16))


def bounds(op: Op) -> Seen:
    """logprob <= 0 and 0 <= entropy <= log V, on near one-hot bfloat16 rows."""
    h, w, t = rows(256, 64, 1024, torch.bfloat16, lean=40.0)
    logprob, entropy = op.call(h, w, t, 1.0)
    top = float(logprob.max())
    low = 0.0 if entropy is None else float(entropy.float().min())
    high = 0.0 if entropy is None else float(entropy.float().max())
    ok = top <= 0 and low >= 0 and high <= math.log(1024) * (1 + 1e-6)
    return Seen(ok, "" if ok else f"logprob up to {top:.1e}, entropy {low:.1e} to {high:.1e}")


def certain_targets(op: Op) -> Seen:
    """d logprob / d logit of the target is 1 - p; p from 0.9 to 1 - 1e-6, identity head."""
    v, gaps = 64, (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    logits = torch.zeros(len(gaps), v)
    for i, gap in enumerate(gaps):
        logits[i, i] = math.log((1 - gap) / gap * (v - 1))
    target = torch.arange(len(gaps))
    one = torch.ones(len(gaps))
    truth = gradients(exact_plain, logits.double(), torch.eye(v).double(), target, one)[2]
    got = gradients(op.call, logits, torch.eye(v), target, one)[2]
    off = (got.double() - truth) / truth
    error = float(off.diagonal().abs().max())
    # float32 holds a logit of 18 to 1e-6: one part in 1e5 of 1 - p is what the input allows
    return bounded(error, 1e-4)


def entropy_alone(op: Op) -> Seen:
    if not op.entropy:
        return Seen(None, "not offered")
    h, w, t = rows(33, 64, 515)
    return against_plain(op, h, w, t, None, coefficients(33))


def expanded_upstream(op: Op) -> Seen:
    """logprob.sum().backward() sends a gradient of stride 0."""
    return against_plain(op, *rows(33, 64, 515), torch.ones(1).expand(33))


def scaled_twice(op: Op) -> Seen:
    """A second backward of the same graph with 1024 times the upstream gives 1024 times."""
    h, w, t = rows(33, 64, 515)
    h = h.requires_grad_()
    logprob, _ = op.call(h, w, t, 1.0)
    c = coefficients(33).to(logprob.dtype)
    (once,) = torch.autograd.grad((c * logprob).sum(), h, retain_graph=True)
    (again,) = torch.autograd.grad((1024 * c * logprob).sum(), h)
    return bounded(errors(again, 1024 * once.double())[0], 1e-5)


def many_tokens(op: Op) -> Seen:
    """bfloat16 dW over 4,096 tokens: sums that are rounded chunk by chunk drift."""
    h, w, t = rows(4096, 32, 300, torch.bfloat16)
    return against_plain(op, h, w, t, coefficients(4096), only=("dweight",))


def half_overflow(op: Op) -> Seen:
    """float16 inputs whose logits pass 65,504."""
    h, w, t = rows(16, 64, 300)
    h, w = (h * 400).half(), (w * 64).half()
    return against_plain(op, h, w, t, coefficients(16))


def temperature(op: Op) -> Seen:
    if not op.temperature:
        return Seen(None, "not offered")
    h, w, t = rows(33, 64, 515)
    return against_plain(op, h, w, t, coefficients(33), temperature=0.6)


def mixed_dtypes(op: Op) -> Seen:
    """bfloat16 hidden states with a float32 head compute in float32."""
    h, w, t = rows(33, 64, 515)
    return against_plain(op, h.bfloat16(), w, t, coefficients(33))


def autocast(op: Op) -> Seen:
    """Log-probs of float32 inputs under torch.autocast(bfloat16), beside plain PyTorch's there."""
    h, w, t = rows(33, 64, 515)
    truth = exact_plain(h.double(), w.double(), t, 1.0)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = op.call(h, w, t, 1.0)
        honest, _ = plain_op(h, w, t, 1.0)
    _, (_, error, limit) = rule(got, truth, honest)
    return bounded(error, limit, " nats")


def nats(op: Op) -> Seen:
    """Largest error of a bfloat16 log-prob; a ratio is the exponential of such an error."""
    h, w, t = rows(512, 64, 1024, torch.bfloat16)
    truth = exact_plain(h.double(), w.double(), t, 1.0)[0]
    honest = exact_plain(h, w, t, 1.0)[0]
    got, _ = op.call(h, w, t, 1.0)
    _, (_, error, limit) = rule(got, truth, honest)
    return bounded(error, limit, " nats")


def leading_dimensions(op: Op) -> Seen:
    """[B, T, D], hidden states as a transposed view."""
    h, w, t = rows(30, 64, 515)
    view = h.view(10, 3, 64).transpose(0, 1)
    return against_plain(op, view, w, t.view(10, 3).T, coefficients(30).view(10, 3).T)


def frozen_head(op: Op) -> Seen:
    h, w, t = rows(33, 64, 515)
    h = h.requires_grad_()
    logprob, _ = op.call(h, w, t, 1.0)
    logprob.sum().backward()
    return Seen(w.grad is None and h.grad is not None)


def empty_batch(op: Op) -> Seen:
    h, w, t = rows(33, 64, 515)
    logprob, _ = op.call(h[:0], w, t[:0], 1.0)
    return Seen(logprob.shape == (0,))


def ignored_targets(op: Op) -> Seen:
    """Target -100: log-prob 0 and no gradient, even where the hidden state is NaN."""
    h, w, t = rows(33, 64, 515)
    h[5] = float("nan")
    t[5] = -100
    h = h.requires_grad_()
    logprob, _ = op.call(h, w, t, 1.0)
    (dh,) = torch.autograd.grad(logprob.sum(), h)
    clean = bool(torch.isfinite(logprob).all() and torch.isfinite(dh).all())
    return Seen(clean and float(logprob[5].detach()) == 0 and not dh[5].any())


def refused(op: Op, h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> Seen:
    try:
        logprob, _ = op.call(h, w, t, 1.0)
    except Exception as error:  # a refusal of any kind is the right answer
        return Seen(True, type(error).__name__)
    return Seen(False, f"accepted, logprob {float(logprob[3]):.1f}")


def target_beyond(op: Op) -> Seen:
    """Target = V must be refused."""
    h, w, t = rows(33, 64, 515)
    t[3] = 515
    return refused(op, h, w, t)


def logits_for_hidden(op: Op) -> Seen:
    """[N, V] logits given as hidden states must be refused."""
    h, w, t = rows(33, 64, 515)
    return refused(op, h @ w.T, w, t)


def inputs_unchanged(op: Op) -> Seen:
    h, w, t = rows(33, 64, 515)
    h, w = h.requires_grad_(), w.requires_grad_()
    before = [x.detach().clone() for x in (h, w, t)]
    logprob, _ = op.call(h, w, t, 1.0)
    logprob.sum().backward()
    return Seen(all(torch.equal(a, b) for a, b in zip(before, (h, w, t), strict=True)))


def zero_coefficients(op: Op) -> Seen:
    """Rows without an upstream gradient change nothing: the gradients equal those without them."""
    h, w, t = rows(40, 64, 515)
    c = coefficients(40)
    c[::2] = 0
    full = gradients(op.call, h, w, t, c)
    part = gradients(op.call, h[1::2], w, t[1::2], c[1::2])
    if full[2][::2].any():
        return Seen(False, "a gradient on a row without upstream")
    return bounded(errors(full[3], part[3])[0], 1e-5, " dweight")


def other_rows(op: Op) -> Seen:
    """A row's float32 log-prob in a batch of 300 and alone."""
    h, w, t = rows(300, 64, 515)
    batch, _ = op.call(h, w, t, 1.0)
    alone = torch.stack([op.call(h[i : i + 1], w, t[i : i + 1], 1.0)[0][0] for i in range(8)])
    return bounded(float((batch[:8] - alone).abs().max().detach()), 2e-5, " nats")


TRAPS = (
    Trap("V odd, not a multiple of any tile", "verl-project/verl/issues/2899", ragged_vocabulary),
    Trap("V smaller than a tile", "", small_vocabulary),
    Trap("all logits near -1e4", "NovaSky-AI/SkyRL/pull/2141", deep_rows),
    Trap("logprob <= 0, entropy >= 0 (bf16)", "verl-project/verl/issues/2656", bounds),
    Trap("p(target) up to 1 - 1e-6", "linkedin/Liger-Kernel/issues/1329", certain_targets),
    Trap("bf16 log-prob, largest error", "verl-project/verl/pull/5662", nats),
    Trap("gradient of the entropy", "huggingface/trl/pull/6625", entropy_alone),
    Trap("upstream gradient of stride 0", "", expanded_upstream),
    Trap("second backward, scaled by 1024", "", scaled_twice),
    Trap("bf16 dW over 4,096 tokens", "linkedin/Liger-Kernel/pull/1391", many_tokens),
    Trap("fp16 logits beyond 65,504", "", half_overflow),
    Trap("temperature 0.6", "", temperature),
    Trap("bf16 hidden, fp32 head", "huggingface/trl/pull/6980", mixed_dtypes),
    Trap("fp32 inputs under bf16 autocast", "linkedin/Liger-Kernel/pull/1283", autocast),
    Trap("[B, T, D], strided", "verl-project/verl/issues/6913", leading_dimensions),
    Trap("frozen head", "PrimeIntellect-ai/prime-rl/pull/3011", frozen_head),
    Trap("N = 0", "", empty_batch),
    Trap("target -100 on a NaN row", "", ignored_targets),
    Trap("target = V refused", "", target_beyond),
    Trap("logits for hidden states refused", "unslothai/unsloth/pull/5244", logits_for_hidden),
    Trap("inputs unchanged", "NovaSky-AI/SkyRL/pull/1650", inputs_unchanged),
    Trap("rows without an upstream gradient", "", zero_coefficients),
    Trap("a row alone and in a batch", "", other_rows),
)  # fmt: skip


def pose(trap: Trap, op: Op) -> Seen:
    """What was seen; an exception is an observation, not a failure of the report."""
    try:
        return trap.pose(op)
    except Exception as error:
        return Seen(None, f"raises {first_line(error)}")
