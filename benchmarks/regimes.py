"""Rows whose softmax looks like a trained model's: what a sparse backward can skip depends on it.

    regime    temperature   like
    flat      1.0           pretraining, early fine-tuning
    sft       0.5           supervised fine-tuning of a good model
    rl        0.3           RL, exploring
    rl-late   0.2           RL at its plateau (entropy 0.2 to 0.4 nats)

The temperature is folded into the hidden states, so that every peer runs its temperature=1 path.
Two sources: real rows (`--rows rows.safetensors`: hidden [n, r], weight [v, r] of a trained head),
lifted to width D by an orthonormal map, which leaves the logits as they are; or a generator:

    z_ij = 3 exp(0.4 x_i) y_ij - 1.5 log(1 + j / 16)        x, y normal, j the vocabulary id

Its constants were fitted to real rows at V = 16,384 (entropy and share of active blocks at the four
temperatures within a quarter). Columns beyond the real vocabulary are rare columns once more,
lowered by a Zipf-like offset. Regimes "NAME at T" are a third source: benchmarks/real_rows.py.
Legend: N rows, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from benchmarks import real_rows

REGIMES = {"flat": 1.0, "sft": 0.5, "rl": 0.3, "rl-late": 0.2}
BLOCK = 128  # vocabulary columns per block, as the backward counts them
ACTIVE = 2.0**-14  # a (row, block) pair with more softmax mass than this is active
SPREAD, SLOPE, KNEE, SHARPNESS = 0.4, 1.5, 16.0, 3.0
ANCHOR = 8.0  # hidden value of the one coordinate that carries the per-column offset
STATISTICS_ROWS = 1024


@dataclass(frozen=True)
class Rows:
    """hidden [N, D], weight [V, D], target [N] drawn from the softmax."""

    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    entropy_nats: float
    active_share: float
    source: str


def make(
    n: int,
    d: int,
    v: int,
    regime: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rows: str | None = None,
) -> Rows:
    """Rows of one regime; the same arguments give the same rows."""
    generator = torch.Generator(device).manual_seed(0)
    if regime in real_rows.REGIMES:
        path, temperature = real_rows.REGIMES[regime]
        hidden, weight = (x.to(device) for x in real_rows.load(path, temperature, n))
        hidden, source = _repeated(hidden, n), "the model's own answers"
        if weight.shape != (v, d):
            raise ValueError(f"{regime} has a head [V, D] of {list(weight.shape)}, not {[v, d]}")
    elif rows is None:
        hidden, weight = _synthetic(n, d, v, device, generator)
        temperature, source = REGIMES[regime], "synthetic rows"
    else:
        hidden, weight = _lifted(rows, n, d, v, device, generator)
        temperature, source = REGIMES[regime], "real rows, lifted"
    # offsets and logits share the temperature
    hidden = (hidden / temperature).to(dtype)
    weight = weight.to(dtype)
    target = torch.empty(n, dtype=torch.int64, device=device)
    entropy, share = [], []
    step = max(1, min(STATISTICS_ROWS, 2**28 // v))
    for start in range(0, n, step):
        p = torch.softmax((hidden[start : start + step] @ weight.T).float(), -1)
        target[start : start + step] = torch.multinomial(p, 1, generator=generator)[:, 0]
        if start < STATISTICS_ROWS:
            entropy.append(-(p * p.clamp(min=1e-38).log()).sum(-1))
            share.append(_active(p))
    return Rows(
        hidden,
        weight,
        target,
        torch.cat(entropy).mean().item(),
        torch.cat(share).mean().item(),
        source,
    )


def _repeated(hidden: torch.Tensor, n: int) -> torch.Tensor:
    """The first n rows of what goes on and on."""
    return hidden.repeat(-(-n // hidden.shape[0]), 1)[:n]


def _active(p: torch.Tensor) -> torch.Tensor:
    """Share of a row's blocks that hold more than ACTIVE of its mass."""
    pad = -p.shape[1] % BLOCK
    blocks = torch.nn.functional.pad(p, (0, pad)).unflatten(1, (-1, BLOCK)).sum(-1)
    return (blocks > ACTIVE).float().mean(1)


def _synthetic(
    n: int, d: int, v: int, device: torch.device, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    size = SHARPNESS * torch.exp(SPREAD * normal(n, 1))
    hidden = size * normal(n, d)
    weight = normal(v, d) / math.sqrt(d - 1)
    hidden[:, -1] = ANCHOR
    weight[:, -1] = -SLOPE * torch.log1p(torch.arange(v, device=device) / KNEE) / ANCHOR
    return hidden, weight


@functools.cache
def load(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [n, r] and weight [v, r] of a .safetensors file, in float32."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise SystemExit(f"--rows {path}: needs the safetensors package") from error
    tensors = load_file(path)
    return tensors["hidden"].float(), tensors["weight"].float()


def _lifted(
    path: str, n: int, d: int, v: int, device: torch.device, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight = (x.to(device) for x in load(path))
    width, known = hidden.shape[1], weight.shape[0]
    if d < width + 1:
        raise ValueError(f"real rows need a width above {width}, not {d}")
    hidden = _repeated(hidden, n)
    anchor = torch.zeros(min(v, known), 1, device=device)
    if v <= known:
        weight = weight[:v]
    else:
        rare = known // 4 * 3
        again = torch.randint(rare, known, (v - known,), device=device, generator=generator)
        ids = torch.arange(known, v, device=device)
        lower = -SLOPE * torch.log(ids / known) / ANCHOR
        weight = torch.cat([weight, weight[again]])
        anchor = torch.cat([anchor, lower[:, None]])
    hidden = torch.cat([hidden, torch.full((n, 1), ANCHOR, device=device)], 1)
    weight = torch.cat([weight, anchor], 1)
    square = torch.randn(d, width + 1, device=device, generator=generator)
    lift = torch.linalg.qr(square).Q.T  # [width + 1, D], orthonormal rows
    return hidden @ lift, weight @ lift


SEQUENCES = 16  # of n / 16 tokens each: coefficients and prompts come by sequence


def prompts(n: int, fraction: float, device: torch.device) -> torch.Tensor:
    """Rows [N] that a loss leaves out: the first `fraction` of each sequence, as a prompt is."""
    length = n / SEQUENCES
    return torch.arange(n, device=device) % length < fraction * length


def coefficients(n: int, zero_fraction: float, device: torch.device) -> torch.Tensor:
    """Upstream gradients of the log-probs [N] as RiskPO sends them: of one sign, constant within a
    sequence, zero for `zero_fraction` of the sequences."""
    generator = torch.Generator().manual_seed(1)
    c = -(0.25 + 0.75 * torch.rand(SEQUENCES, generator=generator))
    order = torch.randperm(SEQUENCES, generator=generator)
    c[order[: round(SEQUENCES * zero_fraction)]] = 0.0
    return c[torch.arange(n) * SEQUENCES // n].to(device)
