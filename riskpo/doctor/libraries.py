"""Calls of each library's own log-prob and loss, shared with benchmarks/; a missing one says why.

Call signatures were read in torch 2.13, trl 1.16, liger-kernel 0.8.5 and verl 0.9.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from riskpo.doctor.packages import attribute
from riskpo.doctor.problem import Problem, Results, clipped_mean, leaves, plain, results
from riskpo.doctor.trl_path import trainer_loss
from riskpo_kernels import linear_logprob

# (hidden [..., D], weight [V, D], target [...], temperature, whether entropy is wanted)
# -> (logprob, entropy or None)
Found = tuple[torch.Tensor, torch.Tensor | None]
LogProb = Callable[..., Found]

TRL = ("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
TRL_COLUMNS = 32768
LIGER = ("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")
VERL = ("verl.utils.experimental.torch_functional", "FusedLinearForPPO")


@dataclass(frozen=True)
class Op:
    """One log-prob function to run the traps on."""

    name: str
    package: str
    call: LogProb
    temperature: bool = True  # whether it takes one
    entropy: bool = True


def riskpo_op(backend: str) -> LogProb:
    def call(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, temperature: float) -> Found:
        token = linear_logprob(
            h, w, t, temperature=temperature, return_entropy=True, backend=backend
        )
        return token.logprob, token.entropy

    return call


def plain_op(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, temperature: float) -> Found:
    """Logits in the input dtype, the rest in float32 at least."""
    z = h @ w.T
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    logp = torch.log_softmax(z / temperature, -1)
    return logp.gather(-1, t[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def torch_op(
    h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, temperature: float, entropy: bool = True
) -> Found:
    options = attribute("torch.nn", "LinearCrossEntropyOptions")  # without them it makes all logits
    op = attribute("torch.nn.functional", "linear_cross_entropy")
    flat = op(h.flatten(0, -2), w, t.flatten(), reduction="none", options=options())
    return -flat.view(t.shape), None


def trl_op(
    h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, temperature: float, entropy: bool = True
) -> Found:
    op, outputs = attribute(*TRL), ("entropy",) if entropy else ()
    logprob, ent, *_ = op.apply(
        h.flatten(0, -2), w, None, t.flatten(), temperature, TRL_COLUMNS, None, 1.0, outputs
    )
    return logprob.view(t.shape), ent.view(t.shape) if entropy else None


def liger_op(
    h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, temperature: float, entropy: bool = True
) -> Found:
    op = attribute(*LIGER)
    out = op.apply(h.flatten(0, -2), w, t.flatten(), temperature, -100, 1, entropy)
    nll, ent = out if entropy else (out, None)
    return -nll.view(t.shape), None if ent is None else ent.view(t.shape)


def verl_op(
    h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, temperature: float, entropy: bool = True
) -> Found:
    op = attribute(*VERL)
    logprob, ent = op(chunk_size=512)(h.flatten(0, -2)[None], w, t.flatten()[None], temperature)
    return logprob[0].view(t.shape), ent[0].view(t.shape)


def ops() -> dict[str, Op]:
    """Every log-prob function by name, in the report's order; absent packages included."""
    triton = "triton" if torch.cuda.is_available() else "torch"
    return {
        "riskpo": Op(f"riskpo linear_logprob ({triton})", "riskpo", riskpo_op(triton)),
        "plain": Op("plain PyTorch, materialised logits", "torch", plain_op),
        "torch": Op("F.linear_cross_entropy", "torch", torch_op, temperature=False, entropy=False),
        "trl": Op("TRL ChunkedLogProbFunction", "trl", trl_op),
        "liger": Op("Liger fused scaled cross-entropy", "liger-kernel", liger_op),
        "verl": Op("verl FusedLinearForPPO", "verl", verl_op),
    }


def with_op(name: str, problem: Problem) -> Results:
    """A library's log-prob and entropy, with GRPO's loss in plain PyTorch on top."""
    op = ops()[name]
    h, w, _ = leaves(problem)
    logprob, entropy = op.call(h, w, problem.target, 1.0)
    loss = clipped_mean(logprob.float(), problem)
    return results(problem, (h, w), loss, logprob=logprob, entropy=entropy)


def liger_loss(problem: Problem) -> Results:
    """Liger's fused head and loss in one, beside its log-prob function."""
    loss_of = attribute("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    op = with_op("liger", problem)
    h, w, _ = leaves(problem)
    grpo = loss_of(
        loss_type="grpo", beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.2,
        temperature=1.0, compiled=False,
    )  # fmt: skip
    given = (h, w, problem.target, problem.mask.to(h.dtype), problem.advantage)
    loss, _ = grpo(*given, old_per_token_logps=problem.old_logprob)
    return op | results(problem, (h, w), loss)


def verl_loss(problem: Problem) -> Results:
    """verl's vanilla policy loss and aggregation on its fused torch head."""
    vanilla = attribute("verl.trainer.ppo.core_algos", "compute_policy_loss_vanilla")
    actor_config = attribute("verl.workers.config", "FSDPActorConfig")
    config = actor_config(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2,
        clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=1e9,
    )  # fmt: skip
    h, w, _ = leaves(problem)
    logprob, entropy = verl_op(h, w, problem.target, 1.0)
    loss, _ = vanilla(
        old_log_prob=problem.old_logprob,
        log_prob=logprob,
        advantages=problem.advantage[:, None].expand_as(logprob),
        response_mask=problem.mask.float(),
        loss_agg_mode="seq-mean-token-mean",
        config=config,
    )
    return results(problem, (h, w), loss, logprob=logprob, entropy=entropy)


# name -> (its results, what is called for them)
LIBRARIES: dict[str, tuple[Callable[[Problem], Results], str]] = {
    "torch": (partial(with_op, "torch"), "F.linear_cross_entropy; loss in plain PyTorch"),
    "trl": (trainer_loss, "GRPOTrainer._compute_loss"),
    "liger": (liger_loss, "log-prob: fused scaled CE; loss: LigerFusedLinearGRPOLoss"),
    "verl": (verl_loss, "FusedLinearForPPO; vanilla policy loss"),
    "plain": (plain, "logits in the input dtype"),
}
