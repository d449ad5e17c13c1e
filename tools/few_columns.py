"""Log-probs, support, several targets, LoRA and divergences on a real head, beside [N, V] logits.

    MALLOC_MMAP_THRESHOLD_=65536 python -m tools.few_columns MODEL_FOLDER [--rows 512]

float32, one thread. Rows are hidden states on this repository's README, temperature .6, or where a
line says so on the model's own answers. Printed, as lines of a Markdown table: CPU seconds of
forward + backward, both sides in turn, the medians of three; the median of their quotients; the
peak beside inputs and gradients, of a process's first call. --answers ends after the log-probs of
the model's own answers, at temperatures 1 and .6.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real_rows import answers
from riskpo.memory_plan.peak_meter import PeakMeter
from riskpo.model.load import Policy, load_policy
from riskpo_kernels import linear_divergence, linear_logprob

KEPT, TARGETS, RANK, T = 50, 8, 16, 0.6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("--rows", type=int, default=512, help="tokens in a call")
    parser.add_argument("--answers", action="store_true", help="only the model's own answers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| what | beside | CPU seconds | quotient | MiB |\n|---|---|---:|---:|---:|", flush=True)
    policy = load_policy(options.model)
    for temperature in (1.0, T):
        hidden, ids = answers(policy, options.rows, temperature)
        own = hidden.requires_grad_(), ids
        log_probs(policy, *own, temperature)
    if options.answers:
        return
    h, w, target = rows_of(options.model, options.rows)
    with torch.no_grad():
        likely = torch.cat([target[:, None], (h @ w.T).topk(KEPT).indices], 1)
    # of every row its target and the likeliest others
    support = torch.tensor([list(dict.fromkeys(row))[:KEPT] for row in likely.tolist()])
    outside = torch.ones(len(h), len(w), dtype=torch.bool).scatter(1, support, False)

    def masked() -> torch.Tensor:
        z = (h @ w.T / T).masked_fill(outside, -torch.inf).log_softmax(-1)
        return z.gather(1, target[:, None])

    def few() -> torch.Tensor:
        return linear_logprob(h, w, target, temperature=T, support=support).logprob

    def targets(count: int) -> Callable[[], torch.Tensor]:
        ids = target if count == 1 else support[:, :count]
        return lambda: linear_logprob(h, w, ids, temperature=T).logprob

    g, frozen = torch.Generator().manual_seed(1), w.detach()
    a = torch.randn(RANK, h.shape[1], generator=g).div_(RANK).requires_grad_()
    b = torch.randn(len(w), RANK, generator=g).mul_(0.01).requires_grad_()

    def merged() -> torch.Tensor:
        z = h @ (frozen + 2.0 * (b @ a)).T / T
        return z.log_softmax(-1).gather(1, target[:, None])

    def adapter() -> torch.Tensor:
        given = {"lora": (a, b, 2.0), "tail_eps": 2.0**-14}
        return linear_logprob(h, frozen, target, temperature=T, **given).logprob

    show(f"support of {KEPT}", few, "[N, V] mask", masked, h, w)
    show(f"{TARGETS} targets", targets(TARGETS), "one target", targets(1), h, w)
    show(f"LoRA of rank {RANK}, tail_eps=2^-14", adapter, "merged head", merged, h, a, b)
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        divergence(kind, kind, h, w)
    divergence("reverse_kl", f"reverse_kl, {len(own[0])} rows of answers", own[0], w)


def divergence(kind: str, name: str, h: torch.Tensor, w: torch.Tensor) -> None:
    """To a teacher with the same head whose hidden states differ by a tenth."""
    g, rows = torch.Generator().manual_seed(0), h.detach()
    noisy = rows + 0.1 * rows.std() * torch.randn(h.shape, generator=g)

    def ours() -> torch.Tensor:
        given = (h, w, noisy, w.detach())
        return linear_divergence(*given, kind=kind, temperature=T, tail_eps=2.0**-14)

    def two_softmaxes() -> torch.Tensor:
        p, q = (h @ w.T / T).log_softmax(-1), (noisy @ w.detach().T / T).log_softmax(-1)
        kl_div = partial(torch.nn.functional.kl_div, reduction="none", log_target=True)
        if kind == "jsd":
            m = torch.logaddexp(p, q) - math.log(2)
            return (kl_div(m, p).sum(-1) + kl_div(m, q).sum(-1)) / 2
        return (kl_div(q, p) if kind == "reverse_kl" else kl_div(p, q)).sum(-1)

    show(f"{name}, tail_eps=2^-14", ours, "two log-softmaxes", two_softmaxes, h, w)


def log_probs(policy: Policy, h: torch.Tensor, ids: torch.Tensor, temperature: float) -> None:
    w = policy.model.get_output_embeddings().weight.detach().clone().requires_grad_()

    def plain() -> torch.Tensor:
        return (h @ w.T / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]

    def fused(eps: float) -> Callable[[], torch.Tensor]:
        return lambda: linear_logprob(h, w, ids, temperature=temperature, tail_eps=eps).logprob

    with torch.no_grad():
        entropy = linear_logprob(h, w, ids, temperature=temperature, return_entropy=True).entropy
        began = time.process_time()
        for _ in range(3):
            h @ w.T
    assert entropy is not None
    name = f"log-probs, {len(h)} rows of answers at T {temperature:g}, entropy {entropy.mean():.2f}"
    gemm = f"[N, V] (bare product {(time.process_time() - began) / 3:.2f} s)"
    show(f"{name}, exact", fused(0.0), gemm, plain, h, w)
    show(f"{name}, tail_eps=2^-14", fused(2.0**-14), gemm, plain, h, w)


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
    (_, mine), (_, held) = cost(run, *leaves), cost(other, *leaves)  # warms up
    pairs = [[cost(f, *leaves)[0] for f in (run, other)] for _ in range(3)]
    ours, theirs = (statistics.median(x) for x in zip(*pairs, strict=True))
    quotient = statistics.median(x / y for x, y in pairs)
    times, memory = f"{ours:.2f} beside {theirs:.2f}", f"{mine:.0f} beside {held:.0f}"
    print(f"| {name} | {other_name} | {times} | {quotient:.2f} | {memory} |", flush=True)


def cost(run: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> tuple[float, float]:
    """CPU seconds and MiB of run and its backward, upstream gradients not uniform."""
    for x in leaves:
        x.grad = None
    meter = PeakMeter(torch.device("cpu"))
    began = time.process_time()
    out = run()
    out.backward(torch.linspace(0.5, 1.5, out.numel()).view_as(out))
    seconds = time.process_time() - began
    return seconds, ((meter.increase() or 0) - sum(x.nbytes for x in leaves)) / 2**20


if __name__ == "__main__":
    main()
