"""Support, several targets and reverse KL on a real head, beside [N, V] logits.

    python -m tools.few_columns MODEL_FOLDER [--rows 512]

Rows are hidden states of the model on this repository's README; float32, temperature .6, one
thread. Printed: CPU seconds of forward + backward, the median of three, and their quotient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from riskpo_kernels import linear_divergence, linear_logprob

KEPT, TARGETS, T = 50, 8, 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("loading the model ...", flush=True)
    h, w, target = rows_of(options.model, options.rows)
    with torch.no_grad():
        likely = torch.cat([target[:, None], (h @ w.T).topk(KEPT).indices], 1)
    # of every row its target and the likeliest others
    support = torch.tensor([list(dict.fromkeys(row))[:KEPT] for row in likely.tolist()])
    noisy = h.detach() + 0.1 * h.detach().std() * torch.randn(
        h.shape, generator=torch.Generator().manual_seed(0)
    )
    outside = torch.ones(len(h), len(w), dtype=torch.bool).scatter(1, support, False)

    def masked() -> torch.Tensor:
        z = (h @ w.T / T).masked_fill(outside, -torch.inf).log_softmax(-1)
        return z.gather(1, target[:, None])

    def two_softmaxes() -> torch.Tensor:
        p, q = (h @ w.T / T).log_softmax(-1), (noisy @ w.detach().T / T).log_softmax(-1)
        return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    def few() -> torch.Tensor:
        return linear_logprob(h, w, target, temperature=T, support=support).logprob

    def targets(count: int) -> Callable[[], torch.Tensor]:
        ids = target if count == 1 else support[:, :count]
        return lambda: linear_logprob(h, w, ids, temperature=T).logprob

    def reverse_kl() -> torch.Tensor:
        given = (h, w, noisy, w.detach())
        return linear_divergence(*given, kind="reverse_kl", temperature=T, tail_eps=2.0**-14)

    show(f"support of {KEPT}", few, "[N, V] mask", masked, h, w)
    show(f"{TARGETS} targets", targets(TARGETS), "one target", targets(1), h, w)
    show("reverse KL, tail_eps=2^-14", reverse_kl, "two [N, V] log-softmaxes", two_softmaxes, h, w)


def rows_of(folder: str, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [N, D], the head [V, D] and the next tokens [N]; the first two want grad."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : rows + 1]
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0, :-1]
    weight = model.get_output_embeddings().weight.detach().clone()
    return hidden.clone().requires_grad_(), weight.requires_grad_(), ids[0, 1:]


def show(
    name: str,
    run: Callable[[], torch.Tensor],
    other_name: str,
    other: Callable[[], torch.Tensor],
    *leaves: torch.Tensor,
) -> None:
    ours, theirs = (seconds(f, *leaves) for f in (run, other))
    print(f"{name} {ours:.2f} s, {other_name} {theirs:.2f} s: {ours / theirs:.2f}", flush=True)


def seconds(run: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> float:
    """CPU seconds of run and its backward, upstream gradients not uniform."""
    taken = []
    for _ in range(4):
        for x in leaves:
            x.grad = None
        began = time.process_time()
        out = run()
        out.backward(torch.linspace(0.5, 1.5, out.numel()).view_as(out))
        taken.append(time.process_time() - began)
    return statistics.median(taken[1:])  # the first warms up


if __name__ == "__main__":
    main()
