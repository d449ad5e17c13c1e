"""One small batch of a policy-gradient step, and by how much a result may be off float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch

from riskpo.doctor.term_sizes import head_sizes
from riskpo.doctor.tolerance import Bound, bounds, summed
from riskpo_kernels import linear_logprob, riskpo_loss

LEAVES = ("hidden", "weight", "bias")
CLIP = (0.8, 1.2)


@dataclass(frozen=True)
class Problem:
    """B responses of at most T tokens, right-padded; D hidden width, V vocabulary."""

    hidden: torch.Tensor  # [B, T, D]
    weight: torch.Tensor  # [V, D]
    target: torch.Tensor  # [B, T] int64, valid ids everywhere
    mask: torch.Tensor  # [B, T] bool, true on tokens of the response
    old_logprob: torch.Tensor  # [B, T] float32, near the new ones: some ratios beyond 1 +- 0.2
    advantage: torch.Tensor  # [B] float32, both signs and one zero
    bias: torch.Tensor | None = None  # [V]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers with hidden, weight and bias in another dtype."""
        return self._each(lambda name, x: x.to(dtype) if name in LEAVES else x)

    def on(self, device: str) -> Problem:
        """The same problem on another device."""
        return self._each(lambda name, x: x.to(device))

    def _each(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Problem:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(k, x) for k, x in given.items() if x is not None})


# What one head and loss gave: of logprob, entropy, lse, loss, ratio_mean, clip_fraction, dhidden,
# dweight and dbias those that there are; per token on the response's tokens only.
Results = dict[str, torch.Tensor]


def peaked(
    g: torch.Generator, rows: tuple[int, ...], width: int, vocab: int, lean: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [rows, width], weight [vocab, width], target [rows]; about half of the targets likely.

    float32 values that every 16-bit dtype holds, so that the truth is the same for all.
    """
    weight = torch.randn(vocab, width, generator=g)
    target = torch.randint(vocab, rows, generator=g)
    pull = torch.rand(*rows, 1, generator=g) * lean / width**0.5
    hidden = torch.randn(*rows, width, generator=g) * 0.3 + pull * weight[target]
    return hidden.bfloat16().float(), weight.bfloat16().float(), target


def make_problem(
    *,
    batch: int = 6,
    tokens: int = 12,
    width: int = 64,
    vocab: int = 509,
    seed: int = 0,
    lean: float = 8.0,
    bias: bool = False,
) -> Problem:
    """Peaked rows (about half of the targets likely), ragged lengths, float32. lean: how peaked.

    The loss is at least half as large as its terms together, and no ratio is within 1 % of a clip
    bound: float32 decides neither its digits nor a branch.
    """
    g = torch.Generator().manual_seed(seed)
    hidden, weight, target = peaked(g, (batch, tokens), width, vocab, lean)
    lengths = torch.randint(max(tokens // 2, 1), tokens + 1, (batch,), generator=g)
    mask = torch.arange(tokens) < lengths[:, None]
    own = torch.Generator().manual_seed(seed)  # so that a bias changes no other draw
    added = (0.5 * torch.randn(vocab, generator=own)).bfloat16().float() if bias else None
    return step_on(hidden, weight, target, mask, g, added)


def step_on(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    g: torch.Generator,
    bias: torch.Tensor | None = None,
) -> Problem:
    """Old log-probs and advantages beside these, as make_problem describes them."""
    batch, tokens = target.shape
    h, w, b = hidden.double(), weight.double(), None if bias is None else bias.double()
    new = linear_logprob(h, w, target, bias=b, backend="reference").logprob
    old = (new.float() + 0.4 * torch.randn(batch, tokens, generator=g)).clamp(max=-1e-3)
    cuts = torch.tensor(CLIP).log()[:, None, None]
    old = torch.where(((new - old - cuts).abs() < 0.01).any(0), old - 0.05, old)
    advantage = torch.randn(batch, generator=g)
    if batch > 1:
        advantage[0] = 0.0
    problem = Problem(hidden, weight, target, mask, old, advantage, bias)
    terms = sums(new[mask], problem)["loss"]
    falls, rises = -terms.clamp(max=0).sum(), terms.clamp(min=0).sum()
    larger = advantage.sign() == (1 if falls > rises else -1)
    ratio = (3 * torch.min(falls, rises) / torch.max(falls, rises)).clamp(min=1).float()
    return replace(problem, advantage=torch.where(larger, advantage * ratio, advantage))


def fresh(x: torch.Tensor) -> torch.Tensor:
    """A copy that wants a gradient."""
    return x.detach().clone().requires_grad_()


def leaves(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(hidden, weight, bias), fresh."""
    bias = None if problem.bias is None else fresh(problem.bias)
    return fresh(problem.hidden), fresh(problem.weight), bias


def ours(problem: Problem, *, backend: str) -> Results:
    """Log-prob, entropy, clipped loss (0.2 / 0.2, mean over sequences), stats and gradients."""
    h, w, b = leaves(problem)
    head = (problem.hidden, problem.weight, problem.target)
    with torch.no_grad():
        token = linear_logprob(*head, bias=problem.bias, return_entropy=True, backend=backend)
    loss, stats = riskpo_loss(
        h, w, problem.target, problem.old_logprob, problem.advantage, bias=b, mask=problem.mask,
        ratio="token", clip_low=0.2, clip_high=0.2, backend=backend,
    )  # fmt: skip
    more = {name: stats[name].detach() for name in ("ratio_mean", "clip_fraction")}
    return results(problem, (h, w, b), loss, **token._asdict()) | more


def plain(problem: Problem, *, logits32: bool = False) -> Results:
    """What trainers write: logits in the input dtype, log-softmax and loss in float32.

    logits32 multiplies in float32 as well, so that only the gradients are rounded.
    """
    h, w, b = leaves(problem)
    logits = h.float() @ w.float().T if logits32 else (h @ w.T).float()
    logits = logits if b is None else logits + b.float()
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    logprob = logp.gather(-1, problem.target[..., None])[..., 0]
    loss, lse = clipped_mean(logprob, problem), logits.logsumexp(-1)
    found = results(problem, (h, w, b), loss, logprob=logprob, entropy=entropy, lse=lse)
    totals = {k: x.sum() for k, x in sums(found["logprob"], problem).items()}
    return totals | found


def clipped_mean(logprob: torch.Tensor, problem: Problem) -> torch.Tensor:
    """GRPO's token-level clipped loss in plain PyTorch (arXiv 2402.03300, eq. 3, without KL)."""
    ratio = (logprob - problem.old_logprob).exp()
    advantage = problem.advantage[:, None]
    term = -torch.min(ratio * advantage, ratio.clamp(*CLIP) * advantage)
    length = problem.mask.sum(1)
    return ((term * problem.mask).sum(1) / length).mean()


def sums(logprob: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]:
    """The terms of loss, ratio_mean and clip_fraction, one for each of the response's tokens.

    logprob: of these tokens, as in Results; in its dtype and on its device.
    """
    at = problem.mask
    ratio = (logprob - problem.old_logprob[at].to(logprob)).exp()
    a = problem.advantage[:, None].expand(at.shape)[at].to(logprob)
    share = 1 / (at.sum(1, keepdim=True).expand(at.shape)[at] * len(at))
    cut = ((a > 0) & (ratio > CLIP[1])) | ((a < 0) & (ratio < CLIP[0]))
    return {
        "loss": -torch.min(ratio * a, ratio.clamp(*CLIP) * a) * share,
        "ratio_mean": ratio / len(ratio),
        "clip_fraction": cut.to(ratio) / len(ratio),
    }


def results(
    problem: Problem,
    wanted: Sequence[torch.Tensor | None],
    loss: torch.Tensor,
    **per_token: torch.Tensor | None,
) -> Results:
    """The loss, its gradients by `wanted` (hidden, weight, bias), and what each token gave [B, T],
    on the response's tokens only. None is left out."""
    loss.backward()
    found = {k: x[problem.mask] for k, x in per_token.items() if x is not None} | {"loss": loss}
    for name, x in zip(LEAVES, wanted, strict=False):
        if x is not None and x.grad is not None:
            found[f"d{name}"] = x.grad
    return {k: x.detach() for k, x in found.items()}


@dataclass(frozen=True)
class Yardstick:
    """What the results of a problem are held against, by name.

    truth   the float64 reference
    honest  plain PyTorch's results; of a total, with all errors of its terms added up, since they
            may cancel by luck
    size    magnitude of the terms that a result sums, in float64
    """

    truth: Results
    honest: Results
    size: Results

    @classmethod
    def of(cls, problem: Problem, honest: Results) -> Yardstick:
        """For a problem; honest: plain PyTorch's results of it in the dtype that is judged."""
        truth = ours(problem.to(torch.float64), backend="reference")
        values, size = dict(honest), _sizes(problem, truth["logprob"])
        exact, rounded = (sums(x["logprob"], problem) for x in (truth, values))
        for name in exact:
            truth[name], values[name], terms = summed(exact[name], rounded[name])
            moved = (exact[name].abs() * size["logprob"]).sum()  # an exponential of a log-prob
            size[name] = terms + (0.0 if name == "clip_fraction" else moved)
        return cls(truth, values, size)

    def bounds(self, name: str, got: torch.Tensor) -> tuple[Bound, Bound]:
        """The rule of tolerance for one named result."""
        got = got.reshape(self.truth[name].shape)
        return bounds(got, self.truth[name], self.honest[name], size=self.size.get(name))


def _sizes(problem: Problem, logprob: torch.Tensor) -> dict[str, torch.Tensor]:
    """`head_sizes` in the shapes of the problem's results. logprob: the true ones."""
    at, x = problem.mask, logprob.detach().requires_grad_()
    (c,) = torch.autograd.grad(sums(x, problem)["loss"].sum(), x)
    sizes = head_sizes(
        problem.hidden[at],
        problem.weight,
        problem.target[at],
        bias=problem.bias,
        upstream={"logprob": c, "curvature": c},
    )
    dhidden = torch.zeros(problem.hidden.shape, dtype=torch.float64)
    dhidden[at] = sizes["dhidden"]
    return sizes | {"dhidden": dhidden}
