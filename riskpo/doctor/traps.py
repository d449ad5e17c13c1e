"""Traps: inputs on which fused heads have been wrong before, run on any log-prob function.

A trap says whether the function passes, with its error and the limit; or which exception it raised;
or that it does not offer the feature. The truth is float64. The limit is twice the error of plain
PyTorch with float32 logits in the same dtype, unless the trap checks an identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from riskpo.doctor.check import Check, bounded, first_line
from riskpo.doctor.libraries import Found, LogProb, Op, plain_op
from riskpo.doctor.problem import fresh, peaked
from riskpo.doctor.term_sizes import head_sizes
from riskpo.doctor.tolerance import bounds, errors

NAMES = ("logprob", "entropy", "dhidden", "dweight")
Results = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]  # of NAMES


@dataclass(frozen=True)
class Trap:
    """origin: a thread on GitHub where it was met, or ""."""

    name: str
    origin: str
    pose: Callable[[Op], Check]


def rows(
    n: int = 33, d: int = 64, v: int = 515, dtype: torch.dtype = torch.float32, lean: float = 8.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [n, d], weight [v, d], target [n]; half of the rows peaked at the target."""
    hidden, weight, target = peaked(torch.Generator().manual_seed(0), (n,), d, v, lean)
    return hidden.to(dtype), weight.to(dtype), target


def coefficients(n: int) -> torch.Tensor:
    """[n] float32 upstream gradients of both signs."""
    return torch.randn(n, generator=torch.Generator().manual_seed(1))


def gradients(
    call: LogProb,
    h: torch.Tensor,
    w: torch.Tensor,
    t: torch.Tensor,
    c: torch.Tensor,
    temperature: float = 1.0,
    of: str = "logprob",
) -> Results:
    """(logprob, entropy, dhidden, dweight) of sum(c * logprob), or of the entropy."""
    h, w = fresh(h), fresh(w)
    logprob, entropy = call(h, w, t, temperature)
    summed = logprob if of == "logprob" else entropy
    assert summed is not None
    dh, dw = torch.autograd.grad((summed * c.to(summed.dtype)).sum(), (h, w))
    return logprob.detach(), None if entropy is None else entropy.detach(), dh, dw


def exact_plain(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, temperature: float) -> Found:
    """Plain PyTorch with float32 logits: the honest error of a dtype."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return plain_op(h.to(wide), w.to(wide), t, temperature)


def against_plain(
    op: Op,
    h: torch.Tensor,
    w: torch.Tensor,
    t: torch.Tensor,
    c: torch.Tensor | None = None,
    temperature: float = 1.0,
    of: str = "logprob",
    only: tuple[str, ...] = NAMES,
) -> Check:
    """Log-prob, gradients and, `of` it, entropy against float64; the worst one is reported."""
    c = coefficients(t.numel()).view(t.shape) if c is None else c
    truth = gradients(exact_plain, h.double(), w.double(), t, c, temperature, of)
    honest = gradients(exact_plain, h, w, t, c, temperature, of)
    got = gradients(op.call, h, w, t, c, temperature, of)
    flat, up = h.reshape(-1, h.shape[-1]), {of: c.reshape(-1)}
    sizes = head_sizes(flat, w, t.reshape(-1), temperature=temperature, upstream=up)
    seen, worst = Check(None), -1.0
    for name, g, x, p in zip(NAMES, got, truth, honest, strict=True):
        if g is None or x is None or p is None or name not in only or name == "entropy" != of:
            continue
        for metric, error, limit in bounds(g, x, p, size=sizes[name].reshape(x.shape)):
            share = math.inf if math.isnan(error) else error / (limit or 1e-300)
            if share > worst:
                unit = f" {name}" if metric == "relative norm" else f" {name}, {metric}"
                worst, seen = share, bounded(error, limit, unit)
    return seen


def deep_rows(op: Op) -> Check:
    """All logits of every row near -1e4: a maximum seeded with 0 gives -inf."""
    h, w, t = rows(16, 63, 512)
    h = torch.cat([h, torch.full((16, 1), 100.0)], 1)
    w = torch.cat([w, torch.full((512, 1), -100.0)], 1)
    # the common offset itself costs digits: compare with plain PyTorch's own loss of them
    return against_plain(op, h, w, t)


def ranges(op: Op) -> Check:
    """logprob <= 0 and 0 <= entropy <= log V, on near one-hot bfloat16 rows."""
    logprob, entropy = op.call(*rows(256, 64, 1024, torch.bfloat16, lean=40.0), 1.0)
    top = float(logprob.max())
    low = 0.0 if entropy is None else float(entropy.float().min())
    high = 0.0 if entropy is None else float(entropy.float().max())
    ok = top <= 0 and low >= 0 and high <= math.log(1024) * (1 + 1e-6)
    return Check(ok, "" if ok else f"logprob up to {top:.1e}, entropy {low:.1e} to {high:.1e}")


def certain_targets(op: Op) -> Check:
    """d logprob / d logit of the target is 1 - p; p from 0.9 to 1 - 1e-6, identity head."""
    v, gaps = 64, (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    logits = torch.zeros(len(gaps), v)
    for i, gap in enumerate(gaps):
        logits[i, i] = math.log((1 - gap) / gap * (v - 1))
    target, one = torch.arange(len(gaps)), torch.ones(len(gaps))
    truth = gradients(exact_plain, logits.double(), torch.eye(v).double(), target, one)[2]
    got = gradients(op.call, logits, torch.eye(v), target, one)[2]
    error = float(((got.double() - truth) / truth).diagonal().abs().max())
    # float32 holds a logit of 18 to 1e-6: one part in 1e5 of 1 - p is what the input allows
    return bounded(error, 1e-4)


def scaled_twice(op: Op) -> Check:
    """A second backward of the same graph with 1024 times the upstream gives 1024 times."""
    h, w, t = rows()
    h = h.requires_grad_()
    logprob, _ = op.call(h, w, t, 1.0)
    c = coefficients(33).to(logprob.dtype)
    (once,) = torch.autograd.grad((c * logprob).sum(), h, retain_graph=True)
    (again,) = torch.autograd.grad((1024 * c * logprob).sum(), h)
    return bounded(errors(again, 1024 * once.double())[0], 1e-5)


def half_overflow(op: Op) -> Check:
    """float16 inputs whose logits pass 65,504."""
    h, w, t = rows(16, 64, 300)
    return against_plain(op, (h * 400).half(), (w * 64).half(), t)


def mixed_dtypes(op: Op) -> Check:
    """bfloat16 hidden states with a float32 head compute in float32."""
    h, w, t = rows()
    return against_plain(op, h.bfloat16(), w, t)


def autocast(op: Op) -> Check:
    """Log-probs of float32 inputs under torch.autocast(bfloat16), beside plain PyTorch's there."""
    h, w, t = rows()
    truth = exact_plain(h.double(), w.double(), t, 1.0)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = op.call(h, w, t, 1.0)
        honest, _ = plain_op(h, w, t, 1.0)
    _, (_, error, limit) = bounds(got, truth, honest)
    return bounded(error, limit, " nats")


def nats(op: Op) -> Check:
    """Largest error of a bfloat16 log-prob; a ratio is the exponential of such an error."""
    h, w, t = rows(512, 64, 1024, torch.bfloat16)
    truth = exact_plain(h.double(), w.double(), t, 1.0)[0]
    honest = exact_plain(h, w, t, 1.0)[0]
    got, _ = op.call(h, w, t, 1.0)
    _, (_, error, limit) = bounds(got, truth, honest)
    return bounded(error, limit, " nats")


def leading_dimensions(op: Op) -> Check:
    """[B, T, D], hidden states as a transposed view."""
    h, w, t = rows(30)
    c = coefficients(30).view(10, 3).T
    return against_plain(op, h.view(10, 3, 64).transpose(0, 1), w, t.view(10, 3).T, c)


def frozen_head(op: Op) -> Check:
    h, w, t = rows()
    h = h.requires_grad_()
    logprob, _ = op.call(h, w, t, 1.0)
    logprob.sum().backward()
    return Check(w.grad is None and h.grad is not None)


def empty_batch(op: Op) -> Check:
    h, w, t = rows()
    logprob, _ = op.call(h[:0], w, t[:0], 1.0)
    return Check(logprob.shape == (0,))


def ignored_targets(op: Op) -> Check:
    """Target -100: log-prob 0 and no gradient, even where the hidden state is NaN."""
    h, w, t = rows()
    h[5] = float("nan")
    t[5] = -100
    h = h.requires_grad_()
    logprob, _ = op.call(h, w, t, 1.0)
    (dh,) = torch.autograd.grad(logprob.sum(), h)
    clean = bool(torch.isfinite(logprob).all() and torch.isfinite(dh).all())
    return Check(clean and float(logprob[5].detach()) == 0 and not dh[5].any())


def refused(op: Op, h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> Check:
    try:
        logprob, _ = op.call(h, w, t, 1.0)
    except Exception as error:  # a refusal of any kind is the right answer
        return Check(True, type(error).__name__)
    return Check(False, f"accepted, logprob {float(logprob[3]):.1f}")


def target_beyond(op: Op) -> Check:
    """Target = V must be refused."""
    h, w, t = rows()
    t[3] = 515
    return refused(op, h, w, t)


def logits_for_hidden(op: Op) -> Check:
    """[N, V] logits given as hidden states must be refused."""
    h, w, t = rows()
    return refused(op, h @ w.T, w, t)


def inputs_unchanged(op: Op) -> Check:
    h, w, t = rows()
    h, w = h.requires_grad_(), w.requires_grad_()
    before = [x.detach().clone() for x in (h, w, t)]
    logprob, _ = op.call(h, w, t, 1.0)
    logprob.sum().backward()
    return Check(all(torch.equal(a, b) for a, b in zip(before, (h, w, t), strict=True)))


def zero_coefficients(op: Op) -> Check:
    """Rows without an upstream gradient change nothing: the gradients equal those without them."""
    h, w, t = rows(40)
    c = coefficients(40)
    c[::2] = 0
    full = gradients(op.call, h, w, t, c)
    part = gradients(op.call, h[1::2], w, t[1::2], c[1::2])
    if full[2][::2].any():
        return Check(False, "a gradient on a row without upstream")
    return bounded(errors(full[3], part[3])[0], 1e-5, " dweight")


def other_rows(op: Op) -> Check:
    """A row's float32 log-prob in a batch of 300 and alone."""
    h, w, t = rows(300)
    batch, _ = op.call(h, w, t, 1.0)
    alone = torch.stack([op.call(h[i : i + 1], w, t[i : i + 1], 1.0)[0][0] for i in range(8)])
    return bounded(float((batch[:8] - alone).abs().max().detach()), 2e-5, " nats")


def offered(has: bool, op: Op, temperature: float = 1.0, of: str = "logprob") -> Check:
    if not has:
        return Check(None, "not offered")
    return against_plain(op, *rows(), temperature=temperature, of=of)


TRAPS = (
    Trap("V odd, not a multiple of any tile", "verl-project/verl/issues/2899",
         lambda op: against_plain(op, *rows(37, 64, 1009))),
    Trap("V smaller than a tile", "", lambda op: against_plain(op, *rows(9, 64, 7))),
    Trap("all logits near -1e4", "NovaSky-AI/SkyRL/pull/2141", deep_rows),
    Trap("logprob <= 0, entropy >= 0 (bf16)", "verl-project/verl/issues/2656", ranges),
    Trap("p(target) up to 1 - 1e-6", "linkedin/Liger-Kernel/issues/1329", certain_targets),
    Trap("bf16 log-prob, largest error", "verl-project/verl/pull/5662", nats),
    Trap("gradient of the entropy", "huggingface/trl/pull/6625",
         lambda op: offered(op.entropy, op, of="entropy")),
    Trap("upstream gradient of stride 0", "",  # as of logprob.sum().backward()
         lambda op: against_plain(op, *rows(), torch.ones(1).expand(33))),
    Trap("second backward, scaled by 1024", "", scaled_twice),
    Trap("bf16 dW over 4,096 tokens", "linkedin/Liger-Kernel/pull/1391",  # sums of chunks drift
         lambda op: against_plain(op, *rows(4096, 32, 300, torch.bfloat16), only=("dweight",))),
    Trap("fp16 logits beyond 65,504", "", half_overflow),
    Trap("temperature 0.6", "", lambda op: offered(op.temperature, op, temperature=0.6)),
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


def pose(trap: Trap, op: Op) -> Check:
    """What was seen; an exception is an observation, not a failure of the report."""
    try:
        return trap.pose(op)
    except Exception as error:
        return Check(None, f"raises {first_line(error)}")
