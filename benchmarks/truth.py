"""Errors against float64, on the timed inputs: every log-prob, and as much of the gradients as is
cheap. Nothing here keeps [N, V] or calls the ops under test.

Log-probs and entropies are compared in every row, dH in some rows, and dW in some rows of the head,
there summed over all tokens, so that what a long sum loses is seen. The head's rows are the most
frequent targets and others at random; with few tokens all of them are taken. Legend: N rows,
D width, V vocabulary, K kept (not masked) rows; p = softmax(z), z = h W^T:

    dz = c (onehot - p) - g p (log p + entropy)        dH = dz W        dW = dz^T h
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

ROWS = {"cpu": 128, "cuda": 1024}  # of logits [N, V]
CHUNK = {"cpu": 2**22, "cuda": 2**27}  # float64 values of one logits-like tensor; some five live
GRADIENTS = {"cpu": 2**23, "cuda": 2**32}  # elements of dz that are formed for dH, and for dW
IGNORED = -100


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return ((x.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def gradients_in(**gradients: torch.Tensor) -> str:
    """The dtypes in which gradients came back: "dH bfloat16, dW bfloat16"."""
    names = {k: str(x.dtype) for k, x in gradients.items()}
    return ", ".join(f"{k} {name.removeprefix('torch.')}" for k, name in names.items())


class Forward(NamedTuple):
    """Of the kept rows [K], float64."""

    logprob: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor


class Columns(NamedTuple):
    """Some columns of the logits."""

    ids: torch.Tensor  # [C]
    weight: torch.Tensor  # [C, D], float64
    place: torch.Tensor  # [V] -> where in ids, or -1


class Head:
    """A head's inputs and what they should give; each result is computed once."""

    ran_whole = True  # errors() calls a provider as it is timed

    def __init__(self, inputs: dict[str, Any]):
        self.given = inputs
        self.weight = inputs["weight"].detach().double()
        self.kept = (inputs["target"] != IGNORED).nonzero()[:, 0]
        self.target = inputs["target"][self.kept]
        device, (v, n) = self.weight.device, (self.weight.shape[0], self.kept.numel())
        budget = _of(GRADIENTS, device)
        rows, columns = min(n, max(1, budget // v)), min(v, max(1, budget // n))
        self.rows = torch.linspace(0, n - 1, rows, device=device).long()  # among the kept ones
        self.everywhere = self._columns(torch.arange(v, device=device))
        self.some = self.everywhere if columns == v else self._columns(self._often(columns))

    def _columns(self, ids: torch.Tensor) -> Columns:
        place = torch.full((self.weight.shape[0],), -1, device=ids.device)
        place[ids] = torch.arange(ids.numel(), device=ids.device)
        return Columns(ids, self.weight if len(ids) == len(place) else self.weight[ids], place)

    def _often(self, size: int) -> torch.Tensor:
        """Half of them the most frequent targets, half any others."""
        order = self.target.bincount(minlength=self.weight.shape[0])
        order = order.argsort(descending=True, stable=True)
        often, seldom = order[: size // 2], order[size // 2 :]
        generator = torch.Generator().manual_seed(2)
        at = torch.randperm(seldom.numel(), generator=generator)[: size - size // 2]
        return torch.cat([often, seldom[at.to(seldom.device)]])

    @property
    def errors_over(self) -> str:
        """What the errors were taken over."""
        v, n = self.weight.shape[0], self.kept.numel()
        rows, columns = self.rows.numel(), self.some.ids.numel()
        if self.given["c"] is None or (rows, columns) == (n, v):
            return "everything"
        return f"every log-prob, dH of {rows} rows, dW of {columns} rows of the head"

    def _chunks(self, among: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
        return among.split(max(1, _of(CHUNK, among.device) // width))

    def _hidden(self, at: torch.Tensor) -> torch.Tensor:
        return self.given["hidden"].detach()[self.kept[at]].double()

    def _everyone(self) -> torch.Tensor:
        return torch.arange(self.kept.numel(), device=self.kept.device)

    @functools.cached_property
    def forward(self) -> Forward:
        """Of every kept row; the entropy is NaN where nobody asked for it."""
        parts = []
        for at in self._chunks(self._everyone(), self.weight.shape[0]):
            z = self._hidden(at) @ self.weight.T
            lse = torch.logsumexp(z, -1)
            logprob = z.gather(-1, self.target[at][:, None])[:, 0] - lse
            entropy = torch.full_like(lse, float("nan"))
            if self.given["entropy"]:
                log_p = z.sub_(lse[:, None])
                entropy = -(log_p.exp() * log_p).sum(-1)
            parts.append((logprob, lse, entropy))
        return Forward(*map(torch.cat, zip(*parts, strict=True)))

    def _dz(
        self,
        h: torch.Tensor,
        at: torch.Tensor,
        columns: Columns,
        c: torch.Tensor,
        g: torch.Tensor | None,
    ) -> torch.Tensor:
        """Gradient of some kept rows' logits in some columns."""
        log_p = (h @ columns.weight.T).sub_(self.forward.lse[at][:, None])
        p = log_p.exp()
        dz = p * -c[at][:, None]
        if g is not None:
            dz -= g[at][:, None] * p * (log_p + self.forward.entropy[at][:, None])
        mine = columns.place[self.target[at]]
        here = (mine >= 0).nonzero()[:, 0]
        dz[here, mine[here]] += c[at][here]
        return dz

    def gradients(
        self, c: torch.Tensor, g: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dH of `rows` and dW of `some` for upstream gradients of the kept rows [K]."""
        dh = [
            self._dz(self._hidden(at), at, self.everywhere, c, g) @ self.weight
            for at in self._chunks(self.rows, self.weight.shape[0])
        ]
        dw = torch.zeros_like(self.some.weight)
        for at in self._chunks(self._everyone(), self.some.ids.numel()):
            h = self._hidden(at)
            dw += self._dz(h, at, self.some, c, g).T @ h
        return torch.cat(dh), dw

    @functools.cached_property
    def per_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients for the upstream gradients that the case sends."""
        c, g = (self.given[k] for k in ("c", "g"))
        return self.gradients(c[self.kept].double(), None if g is None else g[self.kept].double())

    @functools.cached_property
    def mean(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the mean negative log-prob over the kept rows."""
        n = self.kept.numel()
        return self.gradients(torch.full_like(self.forward.lse, -1 / n), None)

    def errors(self, run: Callable[..., Any], per_token: bool) -> dict[str, Any]:
        """Errors of a provider's run(**inputs); it runs as it is timed, on copies of the leaves."""
        leaves = {k: self.given[k].detach().clone() for k in ("hidden", "weight")}
        back = self.given["c"] is not None
        for leaf in leaves.values():
            leaf.requires_grad_(back)
        out = run(**self.given | leaves)
        found: dict[str, Any] = {"errors_over": self.errors_over}
        if per_token:
            found["logprob_error_nats"] = self._largest(out[0], self.forward.logprob)
            if self.given["entropy"] and out[1] is not None:
                found["entropy_error_nats"] = self._largest(out[1], self.forward.entropy)
        else:
            loss = -self.forward.logprob.mean()
            found["loss_error"] = (out.detach().double() - loss).abs().item()
        if back:
            h, w = (leaves[k].grad for k in ("hidden", "weight"))
            dh, dw = self.per_token if per_token else self.mean
            found["dh_error"] = relative_error(h[self.kept[self.rows]], dh)
            found["dw_error"] = relative_error(w[self.some.ids], dw)
            found["gradient_error"] = max(found["dh_error"], found["dw_error"])
            found["gradients_in"] = gradients_in(dH=h, dW=w)
        return found

    def _largest(self, x: torch.Tensor, truth: torch.Tensor) -> float:
        return (x.detach()[self.kept].double() - truth).abs().max().item()


def _of(sizes: dict[str, int], device: torch.device) -> int:
    return sizes.get(device.type, sizes["cpu"])
