"""Log-probs, support, several targets, LoRA and reverse KL on a real head, beside [N, V] logits.

    MALLOC_MMAP_THRESHOLD_=65536 python -m tools.few_columns MODEL_FOLDER [--rows 512]

float32, one thread. Log-probs are those of the model's own answers at temperatures 1 and .6;
for the others rows are hidden states on this repository's README, temperature .6. Printed: CPU
seconds of forward + backward, the median of three, the peak beside inputs and gradients, quotient.
--answers ends after the log-probs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from riskpo.memory_plan.peak_meter import PeakMeter
from riskpo.model.load import Policy, load_policy
from riskpo.rollout.generate import GenerateSampler
from riskpo.rollout.sampler import SamplingLimits
from riskpo.types import Question
from riskpo_kernels import linear_divergence, linear_logprob

KEPT, TARGETS, RANK, T = 50, 8, 16, 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--answers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("loading the model ...", flush=True)
    policy = load_policy(options.model)
    for temperature in (1.0, T):
        answers(policy, options.rows, temperature)
    if options.answers:
        return
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

    g, frozen = torch.Generator().manual_seed(1), w.detach()
    a = torch.randn(RANK, h.shape[1], generator=g).div_(RANK).requires_grad_()
    b = torch.randn(len(w), RANK, generator=g).mul_(0.01).requires_grad_()

    def merged() -> torch.Tensor:
        z = h @ (frozen + 2.0 * (b @ a)).T / T
        return z.log_softmax(-1).gather(1, target[:, None])

    def adapter() -> torch.Tensor:
        given = {"lora": (a, b, 2.0), "tail_eps": 2.0**-14}
        return linear_logprob(h, frozen, target, temperature=T, **given).logprob

    show(f"LoRA of rank {RANK}, tail_eps=2^-14", adapter, "merged head, [N, V]", merged, h, a, b)
    show(f"support of {KEPT}", few, "[N, V] mask", masked, h, w)
    show(f"{TARGETS} targets", targets(TARGETS), "one target", targets(1), h, w)
    show("reverse KL, tail_eps=2^-14", reverse_kl, "two [N, V] log-softmaxes", two_softmaxes, h, w)


def answers(policy: Policy, rows: int, temperature: float) -> None:
    """Log-probs of the first tokens of every answer that the model sampled."""
    asked = [f"What is {a} + {b}? Explain." for a in range(3, 11) for b in (5, 17)]
    sampler = GenerateSampler(policy, SamplingLimits(64, 48, temperature))
    drawn = sampler.sample([Question(x, x, "") for x in asked], 2, (0, 1))
    hidden, target = [], []
    for tokens, start in zip(drawn.tokens, drawn.prompt_len, strict=True):
        with torch.no_grad():
            states = policy.model.base_model(tokens[None]).last_hidden_state[0, start - 1 : -1]
        hidden.append(states[: rows // len(drawn)])
        target.append(tokens[start:][: rows // len(drawn)])
    h, ids = torch.cat(hidden).requires_grad_(), torch.cat(target)
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
    gemm = (time.process_time() - began) / 3
    print(
        f"{len(h)} rows of answers at temperature {temperature:g}, mean entropy "
        f"{entropy.mean():.2f}, the bare product of their logits {gemm:.2f} s",
        flush=True,
    )
    show("log-probs, exact", fused(0.0), "[N, V]", plain, h, w)
    show("log-probs, tail_eps=2^-14", fused(2.0**-14), "[N, V]", plain, h, w)


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
    (ours, mine), (theirs, held) = (cost(f, *leaves) for f in (run, other))
    print(
        f"{name} {ours:.2f} s ({mine:.0f} MiB), {other_name} {theirs:.2f} s ({held:.0f} MiB): "
        f"{ours / theirs:.2f}",
        flush=True,
    )


def cost(run: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> tuple[float, float]:
    """CPU seconds and MiB of run and its backward, upstream gradients not uniform."""
    taken = []
    for x in leaves:
        x.grad = None
    meter = PeakMeter(torch.device("cpu"))
    for _ in range(4):
        for x in leaves:
            x.grad = None
        began = time.process_time()
        out = run()
        out.backward(torch.linspace(0.5, 1.5, out.numel()).view_as(out))
        taken.append(time.process_time() - began)
        if len(taken) == 1:
            peak = (meter.increase() or 0) - sum(x.nbytes for x in leaves)
    return statistics.median(taken[1:]), peak / 2**20  # the first warms up


if __name__ == "__main__":
    main()
