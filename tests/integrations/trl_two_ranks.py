"""One of two gloo processes: `python -m tests.integrations.trl_two_ranks FOLDER`.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which. Groups of answers straddle the ranks: six
rows on each, four answers to each of three questions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from riskpo.integrations.trl.rows import answer_key
from riskpo_kernels import add_fused_lm_head
from tests.integrations.test_trl_loss import batch, old_logprob
from tests.integrations.trl_toy import trainer
from tests.toy import tiny_policy

BATCH = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "riskpo_bundle_size": 3,
    "save_strategy": "steps",
    "save_steps": 1,
}
LOSS = {"importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": 0.28}


def run(folder: Path, **changes):
    return trainer(folder / "run", **BATCH, **changes)


def trained(folder: Path) -> dict:
    """Two steps, and again the second one from the first one's checkpoint."""
    whole = run(folder, max_steps=2)
    rows = []
    host_loss = whole._compute_loss

    def spy(model, inputs):
        parts = (inputs["completion_ids"], inputs["completion_mask"], inputs["advantages"].tolist())
        for ids, mask, advantage in zip(*parts, strict=True):
            rows.append([answer_key(ids[mask != 0].tolist()), advantage])
        return host_loss(model, inputs)

    whole._compute_loss = spy
    whole.train()
    rest = run(folder, max_steps=2)
    rest.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-1"))
    return {
        "state": whole._riskpo_state(),
        "resumed": rest._riskpo_state(),
        "logged": list(whole._logs["advantages"]),
        "rows": rows[6:],  # of the last generation batch
        "weights": [float(p.double().sum()) for p in whole.model.parameters()],
    }


def arranged(folder: Path, rank: int, order: list[int]) -> list[float]:
    """Advantages of twelve made-up rows, in their own order, for rows laid out in `order`."""
    fresh = run(folder)
    rewards = torch.tensor([0.0, 1, 2, 3, 1, 1, 4, 0, 2, 2.5, 2, 1.5])
    mine = order[6 * rank : 6 * rank + 6]
    moved = fresh._advantages(
        rewards[order], [f"question {i // 4}" for i in mine], [answer_key([i]) for i in mine], None
    )
    result = torch.empty(12)
    result[order] = moved
    return result.tolist()


def gradient(folder: Path, rank: int, loss_type: str) -> list[float]:
    """Mean over the ranks, as DDP takes it, of one optimiser step's gradients."""
    half = run(folder, **LOSS, loss_type=loss_type)
    inputs = batch(half.model.config.vocab_size)
    inputs["old_per_token_logps"] = old_logprob(half, inputs)
    half.model.train()
    half.current_gradient_accumulation_steps = 2
    for rows in torch.arange(4 * rank, 4 * rank + 4).split(2):  # two micro-batches of two rows
        part = {k: v[rows] if v.dim() else v for k, v in inputs.items()}
        half._compute_loss(half.model, part).backward()
    flat = torch.cat([p.grad.flatten() for p in half.model.parameters()])
    dist.all_reduce(flat)
    return (flat / 2).tolist()


def log_prob_gradients(units: str, rows_of: list[int]) -> dict[str, list[float]]:
    """Of the mean over `rows_of` ranks' rows; FSDP2 shards the model, or its head apart, or not."""
    model = tiny_policy().model
    add_fused_lm_head(model)
    if units == "head":
        fully_shard(model.lm_head)
    if units != "none":
        fully_shard(model)
    for rank in rows_of:
        g = torch.Generator().manual_seed(rank)
        ids = torch.randint(2, model.config.vocab_size, (3, 9), generator=g)
        out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        ((out.log_probs.sum() + out.entropy.sum()) / len(rows_of)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).flatten().tolist()
        for name, x in gradients.items()
    }


def main() -> None:
    folder = Path(sys.argv[1])
    found = trained(folder)
    rank = dist.get_rank()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    found["arranged"] = [arranged(folder, rank, rows) for rows in (list(range(12)), order)]
    for loss_type in ("grpo", "dapo"):
        found[loss_type] = gradient(folder, rank, loss_type)
    found["unsharded"] = log_prob_gradients("none", [0, 1])
    for units in ("model", "head"):
        found[f"sharded-{units}"] = log_prob_gradients(units, [rank])
    (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
