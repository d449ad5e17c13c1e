"""The language-model head as plain numbers: what stands between hidden states and logits.

logits = softcap(scale * (h W^T + bias)), and nothing else. `find_head` reads the family's settings
from the model's config and then checks the claim on a few tokens against the model's own logits,
so that a model with something in between is refused rather than trained on wrong log-probs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# name in model.config -> how it turns into a factor of the logits
FACTORS = {
    "logit_scale": lambda x: x,  # Cohere
    "lm_head_multiplier": lambda x: x,  # Falcon-H1
    "output_multiplier": lambda x: x,
    "output_multiplier_scale": lambda x: x,
    "logits_scaling": lambda x: 1.0 / x,  # Granite divides
}
PROBE_TOKENS = 8


@dataclass(frozen=True)
class HeadOptions:
    """Keywords of riskpo_kernels.linear_logprob."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Head:
    """weight [V, D] and bias [V] are the model's own parameters, not copies."""

    module: Any
    options: HeadOptions

    @property
    def weight(self) -> torch.Tensor:
        return self.module.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.module, "bias", None)


def head_options(config: Any) -> HeadOptions:
    """Scale and softcap as the model's config names them (its text part, where it has several)."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name, factor in FACTORS.items():
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value:
            scale *= factor(float(value))
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadOptions(scale, float(softcap) if softcap else None)


def find_head(model: Any) -> Head:
    """The head of a causal LM, verified; ValueError where the formula is not the model's."""
    module = model.get_output_embeddings()
    if module is None or getattr(module, "weight", None) is None:
        raise ValueError(
            f"head: got a {type(model).__name__} without output embeddings; expected a causal "
            "language model with one linear head. Load it with AutoModelForCausalLM."
        )
    head = Head(module, head_options(model.config))
    gap = _gap(model, head)
    if not gap < 2e-2:
        raise ValueError(
            f"head: got a {type(model).__name__} whose logits differ from softcap(scale * (h W^T "
            f"+ bias)) with {head.options} by {gap:.3g} of their largest; expected rounding. Its "
            "forward does something else to them: add that to riskpo/head.py."
        )
    return head


@torch.no_grad()
def _gap(model: Any, head: Head) -> float:
    """Largest difference between the formula's and the model's logits, relative to the largest."""
    device, vocab = head.weight.device, head.weight.shape[0]
    ids = torch.arange(PROBE_TOKENS, device=device)[None] * 7919 % vocab
    was_training = model.training
    model.eval()
    theirs = model(input_ids=ids, use_cache=False).logits
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    model.train(was_training)
    return relative_gap(head, hidden, theirs)


def relative_gap(head: Head, hidden: torch.Tensor, theirs: torch.Tensor) -> float:
    """The same for hidden states [..., D] and the model's logits [..., V] of them."""
    theirs = theirs.float()
    ours = hidden.float() @ head.weight.float().T
    if head.bias is not None:
        ours = ours + head.bias.float()
    ours = ours * head.options.scale
    if head.options.softcap is not None:
        ours = head.options.softcap * torch.tanh(ours / head.options.softcap)
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
