"""The language-model head as plain numbers: what stands between hidden states and logits.

logits = softcap(scale * (h W^T + bias)), and nothing else. The config proposes scales and softcaps,
a probe (head_probe.py) settles which of them the model's forward really applies, and a
model with anything else on the way is refused rather than trained on wrong log-probs. What peft
wraps around a head is followed where it is a weight or plain LoRA, and refused where it is not
(head_weight.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from riskpo_kernels.causal_lm.decoder import unwrapped
from riskpo_kernels.causal_lm.head_probe import look
from riskpo_kernels.causal_lm.head_weight import computed, low_rank, refuse_wrapped_head

# Names of numbers in a config that may act on the logits. A name proposes, the probe decides: the
# same logits_scaling divides in Granite and multiplies in HyperCLOVA X.
SCALES = re.compile(r"(logit|lm_head|output|mup).*(scal|mult|alpha|width)|^dim_model_base$")
CAPS = re.compile(r"(logit|output|lm_head|final).*cap|^soft_?cap")
ELSEWHERE = re.compile(r"att(n|ention)|router|moe|gate|mlp|init|contrastive|vision|audio")
DIVIDES = ("logits_scaling", "logits_mup_width_multiplier")
MOST = 6  # numbers of either kind in one config


@dataclass(frozen=True)
class HeadOptions:
    """Keywords of riskpo_kernels.linear_logprob."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Head:
    """weight [V, D] and bias [V] are the model's own parameters, as its adapters make them now.

    rows: how many of the weight's rows have a logit, where the model drops the padding.
    """

    module: Any
    options: HeadOptions
    rows: int | None = None

    @property
    def weight(self) -> torch.Tensor:
        weight, _ = computed(self.module)
        return weight if self.rows is None else weight[: self.rows]

    @property
    def bias(self) -> torch.Tensor | None:
        _, bias = computed(self.module)
        return bias if bias is None or self.rows is None else bias[: self.rows]

    @property
    def lora(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """(A, B, factor) of LoRA on the head, where it acts."""
        found = low_rank(self.module)
        if found is None or self.rows is None:
            return found
        a, b, factor = found
        return a, b[: self.rows], factor

    @property
    def keywords(self) -> dict[str, Any]:
        """What linear_logprob and riskpo_loss are given of it beside the weight."""
        # no asdict: torch.compile does not trace Python 3.10's
        shape = {"scale": self.options.scale, "softcap": self.options.softcap}
        return {"bias": self.bias, "lora": self.lora, **shape}


def proposals(config: Any) -> Iterator[HeadOptions]:
    """Every reading of the config's numbers, the likeliest first.

    A scale multiplies, divides or plays no part in the logits; of the softcaps at most one acts.
    """
    scales, caps = [], []
    for name, value in _numbers(config):
        if CAPS.search(name):
            caps.append(value)
        elif SCALES.search(name) and value != 1.0:
            readings = (1.0 / value, value) if name in DIVIDES else (value, 1.0 / value)
            scales.append((*readings, 1.0))
    for softcap, factors in product((*caps[:MOST], None), product(*scales[:MOST])):
        yield HeadOptions(float(torch.tensor(factors, dtype=torch.float64).prod()), softcap)


def _numbers(config: Any) -> list[tuple[str, float]]:
    """(name, value) of the numbers above 0 that are named as if they acted on logits."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: dict[str, float] = {}
    for part in (text, config):
        derived = [n for n, v in vars(type(part)).items() if isinstance(v, property)]
        for name in (*vars(part), *derived):
            if ELSEWHERE.search(name) or not (SCALES.search(name) or CAPS.search(name)):
                continue
            value = getattr(part, name)
            if name == "dim_model_base" and value:  # MiniCPM's remote code
                value = value / part.hidden_size
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                found.setdefault(name, float(value))
    return list(found.items())


def find_head(model: Any) -> Head:
    """The head of a causal LM, verified; ValueError where the formula is not the model's.

    The probe replaces the decoder's output by random hidden states from 0 to far above what any
    softcap lets through, and compares the model's logits of them with the formula's. It also asks
    which parameters and buffers those logits depend on: one that the formula lacks is named, even
    while it changes nothing (an adapter that is still zero, a bias that is). What the decoder
    gives when it is called as the update calls it is compared too.
    """
    model = unwrapped(model)
    module = model.get_output_embeddings()
    if module is None:
        raise ValueError(
            f"head: got a {type(model).__name__} without output embeddings; expected a causal "
            "language model with one linear head. Load it with AutoModelForCausalLM."
        )
    refuse_wrapped_head(model, module)
    sight = look(model, Head(module, HeadOptions()))
    best, gap = HeadOptions(), float("inf")
    for options in proposals(model.config):
        worst = sight.gap(options)
        if worst < gap:
            best, gap = options, worst
    if not gap < sight.tolerance:
        raise ValueError(
            f"head: got a {type(model).__name__} whose logits differ from softcap(scale * (h W^T "
            f"+ bias)) with {best} by {gap:.3g} of their size; expected rounding. Its forward "
            "does something else to them, or takes a number that its config does not name."
        )
    return Head(module, best, sight.rows)
