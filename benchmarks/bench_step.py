"""One RiskPO update of a small model with random weights: what share of it is the loss stage?

Rewards -> RiskPOAdvantage -> trunk forward -> loss stage (head, loss and their backward) -> trunk
backward -> AdamW. The trunk's output is cut from the graph, so that the loss stage is timed alone.
The head is scaled until its rows are as peaked as a policy's.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import memory, peers
from benchmarks.provider import Provider, auto_backend, too_large
from riskpo_kernels import RiskPOAdvantage, linear_logprob, reference, riskpo_loss

QUESTIONS, DRAWS = 10, 2
SHARPNESS = 9.0  # standard deviation of the logits: mean entropy near 0.8 nats at V = 32,768
CASES: dict[str, dict[str, Any]] = {
    "small": {"tokens_each": 16, "width": 64, "layers": 2, "vocab": 2048, "dtype": "float32"}
}


def inputs(
    tokens_each: int, width: int, layers: int, vocab: int, dtype: str, device: str = "cpu"
) -> dict[str, Any]:
    """A Qwen2 trunk, its untied head, sampled targets, rewards of 20 responses, an optimiser."""
    if importlib.util.find_spec("transformers") is None:
        return {"missing": torch.zeros(0, device=device)}
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        use_cache=False,
    )
    kind = getattr(torch, dtype)
    with torch.device(device):
        trunk = Qwen2Model(config).to(kind)
        head = torch.nn.Linear(width, vocab, bias=False, dtype=kind)
        torch.nn.init.normal_(head.weight, std=SHARPNESS / width**0.5)
        ids = torch.randint(vocab, (QUESTIONS * DRAWS, tokens_each))
        target = torch.randint(vocab, (ids.numel(),))
    entropies = []
    with torch.no_grad():
        hidden = trunk(input_ids=ids).last_hidden_state.flatten(0, 1)
        for rows in torch.arange(ids.numel(), device=device).split(1024):
            p = torch.softmax((hidden[rows] @ head.weight.T).float(), -1)
            target[rows] = torch.multinomial(p, 1)[:, 0]
            entropies.append(-(p * p.clamp(min=1e-38).log()).sum(-1))
        old = linear_logprob(hidden, head.weight, target).logprob
    parameters = [*trunk.parameters(), *head.parameters()]
    starts = torch.arange(QUESTIONS * DRAWS + 1, dtype=torch.int32, device=device) * tokens_each
    return {
        "trunk": trunk,
        "head": head,
        "ids": ids,
        "target": target,
        "old_logprob": old,
        "cu_seqlens": starts,
        "rewards": (torch.arange(QUESTIONS * DRAWS) % 3 == 0).float().to(device),
        "question_id": (torch.arange(QUESTIONS * DRAWS) // DRAWS).to(device),
        "optimizer": torch.optim.AdamW(parameters, lr=0.0),
        "_facts": {"entropy_nats": torch.cat(entropies).mean().item()},
    }


def providers() -> dict[str, Provider]:
    """The same step with two loss stages."""
    backend = auto_backend("linear_logprob")
    return {
        "riskpo_loss": Provider(_step(_fused), kind="ours", why_not=_missing, backend=backend),
        "plain": Provider(_step(_plain), kind="plain", why_not=_fits),
    }


def cost(tokens_each: int, width: int, layers: int, vocab: int, dtype: str) -> dict[str, float]:
    """6 flops per weight and token; weights, gradients and two moments read and written."""
    weights = float(layers * 14.5 * width**2 + vocab * width)
    return {
        "bytes": 8.0 * getattr(torch, dtype).itemsize * weights,
        "flops": 6.0 * weights * QUESTIONS * DRAWS * tokens_each,
    }


def extras(provider: Provider, given: dict[str, Any]) -> dict[str, float]:
    """Median time of each stage over three steps, and the loss stage's own peak memory."""
    runs = [provider.run(**given) for _ in range(3)]
    stages = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    stages["loss_share"] = stages["loss_ms"] / sum(stages.values())
    loss = _fused if provider.kind == "ours" else _plain
    with torch.no_grad():
        hidden = given["trunk"](input_ids=given["ids"]).last_hidden_state.flatten(0, 1)
    batch = {k: given[k] for k in ("target", "old_logprob", "cu_seqlens")}
    batch |= {"hidden": hidden.requires_grad_(), "weight": given["head"].weight}
    batch["advantage"] = _advantage(given)
    stages["loss_peak_mib"], _ = memory.peak_of(
        lambda: loss(**batch).backward(), batch, given["ids"].device.type
    )
    return stages


def _missing(given: dict[str, Any]) -> str | None:
    return None if "trunk" in given else "transformers is not installed"


def _fits(given: dict[str, Any]) -> str | None:
    if "trunk" not in given:
        return "transformers is not installed"
    return too_large(given, 12.0 * given["target"].numel() * given["head"].weight.shape[0])


def _advantage(given: dict[str, Any]) -> torch.Tensor:
    op = RiskPOAdvantage("paper")
    return op(given["rewards"], given["question_id"], step=0)[0]


def _fused(**batch: torch.Tensor) -> torch.Tensor:
    return riskpo_loss(**batch).loss


def _plain(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **rest: torch.Tensor
) -> torch.Tensor:
    logprob, _ = peers.plain(hidden, weight, target, False)
    return reference.clipped_surrogate(logprob, **rest).loss


def _step(loss: Callable[..., torch.Tensor]) -> Callable[..., dict[str, float]]:
    def run(**given: Any) -> dict[str, float]:
        clock = _Clock(given["ids"].device)
        given["optimizer"].zero_grad(set_to_none=True)
        advantage = _advantage(given)
        clock.stop("advantage_ms")
        out = given["trunk"](input_ids=given["ids"]).last_hidden_state
        hidden = out.detach().flatten(0, 1).requires_grad_()
        clock.stop("trunk_forward_ms")
        loss(
            hidden=hidden,
            weight=given["head"].weight,
            target=given["target"],
            old_logprob=given["old_logprob"],
            advantage=advantage,
            cu_seqlens=given["cu_seqlens"],
        ).backward()
        clock.stop("loss_ms")
        out.backward(hidden.grad.view_as(out))
        clock.stop("trunk_backward_ms")
        given["optimizer"].step()
        clock.stop("optimizer_ms")
        return clock.stages

    return run


class _Clock:
    """Wall-clock time of consecutive stages; waits for the device at each stop."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.stages: dict[str, float] = {}
        self._wait()
        self.last = time.perf_counter()

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def stop(self, name: str) -> None:
        self._wait()
        now = time.perf_counter()
        self.stages[name], self.last = (now - self.last) * 1e3, now
