"""One small batch of a policy-gradient step, and how far a result is from float64."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from riskpo_kernels import linear_logprob, riskpo_loss

FACTOR = 2.0  # at most twice the error of plain PyTorch in the same dtype
FLOOR = 2.0**-22  # plain PyTorch is sometimes exact by luck


@dataclass(frozen=True)
class Problem:
    """B responses of at most T tokens, right-padded; D hidden width, V vocabulary."""

    hidden: torch.Tensor  # [B, T, D]
    weight: torch.Tensor  # [V, D]
    target: torch.Tensor  # [B, T] int64, valid ids everywhere
    mask: torch.Tensor  # [B, T] bool, true on tokens of the response
    old_logprob: torch.Tensor  # [B, T] float32, near the new ones: some ratios beyond 1 +- 0.2
    advantage: torch.Tensor  # [B] float32, both signs and one zero

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers with hidden and weight in another dtype."""
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))

    def on(self, device: str) -> Problem:
        """The same problem on another device."""
        return Problem(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class Results(NamedTuple):
    """What one head and loss gave, by name: logprob, entropy, loss, dhidden, dweight."""

    values: dict[str, torch.Tensor]
    note: str = ""


def make_problem(
    *, batch: int = 6, tokens: int = 12, width: int = 64, vocab: int = 509, seed: int = 0
) -> Problem:
    """Peaked rows (about half of the targets likely), ragged lengths, float32."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=g)
    target = torch.randint(vocab, (batch, tokens), generator=g)
    lean = torch.rand(batch, tokens, 1, generator=g) * 8 / width**0.5
    hidden = torch.randn(batch, tokens, width, generator=g) * 0.3 + lean * weight[target]
    lengths = torch.randint(tokens // 2, tokens + 1, (batch,), generator=g)
    mask = torch.arange(tokens) < lengths[:, None]
    new = linear_logprob(hidden.double(), weight.double(), target, backend="reference").logprob
    old = new.float() + 0.4 * torch.randn(batch, tokens, generator=g)
    advantage = torch.randn(batch, generator=g)
    advantage[0] = 0.0
    # float32 values that every 16-bit dtype holds, so that the truth is the same for all
    return Problem(
        hidden.bfloat16().float(), weight.bfloat16().float(), target, mask, old.clamp(max=-1e-3),
        advantage,
    )  # fmt: skip


def leaves(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden, weight), fresh copies that want a gradient."""
    return (
        problem.hidden.detach().clone().requires_grad_(),
        problem.weight.detach().clone().requires_grad_(),
    )


def ours(problem: Problem, *, backend: str, ratio: str = "token") -> Results:
    """Log-prob, entropy, clipped loss (0.2 / 0.2, mean over sequences) and its gradients."""
    h, w = leaves(problem)
    token = linear_logprob(
        h.detach(), w.detach(), problem.target, return_entropy=True, backend=backend
    )
    loss = riskpo_loss(
        h,
        w,
        problem.target,
        problem.old_logprob,
        problem.advantage,
        mask=problem.mask,
        ratio=ratio,
        clip_low=0.2,
        clip_high=0.2,
        backend=backend,
    ).loss
    loss.backward()
    return results(problem, token.logprob, token.entropy, loss, h.grad, w.grad)


def plain(problem: Problem, *, logits32: bool = False) -> Results:
    """What trainers write: logits in the input dtype, log-softmax and loss in float32.

    logits32 multiplies in float32 as well, so that only the gradients are rounded.
    """
    h, w = leaves(problem)
    logits = h.float() @ w.float().T if logits32 else (h @ w.T).float()
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    logprob = logp.gather(-1, problem.target[..., None])[..., 0]
    loss = clipped_mean(logprob, problem)
    loss.backward()
    return results(problem, logprob, entropy, loss, h.grad, w.grad, "logits in the input dtype")


def clipped_mean(logprob: torch.Tensor, problem: Problem) -> torch.Tensor:
    """GRPO's token-level clipped loss in plain PyTorch (arXiv 2402.03300, eq. 3, without KL)."""
    ratio = (logprob - problem.old_logprob).exp()
    advantage = problem.advantage[:, None]
    term = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    length = problem.mask.sum(1)
    return ((term * problem.mask).sum(1) / length).mean()


def results(
    problem: Problem,
    logprob: torch.Tensor | None,
    entropy: torch.Tensor | None,
    loss: torch.Tensor | None,
    dhidden: torch.Tensor | None,
    dweight: torch.Tensor | None,
    note: str = "",
) -> Results:
    """Named results with log-prob and entropy on the response's tokens only; None is left out."""
    named = {
        "logprob": None if logprob is None else logprob[problem.mask],
        "entropy": None if entropy is None else entropy[problem.mask],
        "loss": loss,
        "dhidden": dhidden,
        "dweight": dweight,
    }
    return Results({k: v.detach().double() for k, v in named.items() if v is not None}, note)


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth; NaN where x is not finite.

    Where the truth is 0, anything but 0 is infinitely wrong.
    """
    if not torch.isfinite(x).all():
        return float("nan")
    return float((x - truth).norm() / truth.norm().clamp(min=1e-300))


def largest_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference; NaN where x is not finite."""
    return float((x - truth).abs().max()) if torch.isfinite(x).all() else float("nan")


def within(error: float, plain_error: float, floor: float = FLOOR) -> bool:
    """The rule: at most FACTOR times plain PyTorch's error, and a floor. NaN is not within."""
    return error <= FACTOR * plain_error + floor
