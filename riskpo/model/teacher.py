"""The teacher of algorithm="distill": a frozen model, whole in every process.

The loss at each token that the student sampled is the divergence between student and teacher over
the whole vocabulary. riskpo_kernels.linear_divergence computes it without a [tokens, vocab] tensor
of either. T tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from riskpo.config import RunConfig
from riskpo.model.isolation import settle_attention
from riskpo.model.load import Policy, load_policy
from riskpo.model.packing import IGNORE, Packed, hidden_states
from riskpo_kernels import linear_divergence
from riskpo_kernels.causal_lm import Head, find_head


@dataclass(frozen=True)
class Teacher:
    """A frozen model and its head."""

    model: Any
    head: Head

    def divergence(
        self, hidden: torch.Tensor, head: Head, batch: Packed, config: RunConfig
    ) -> torch.Tensor:
        """Divergence [T] in nats, 0 where the target is ignored.

        hidden [T, D] and head are the student's; gradients go to both. Of two heads with different
        numbers of rows, the surplus rows are padding and left out.
        """
        with torch.no_grad():
            theirs, their_weight = hidden_states(self.model, batch), self.head.weight.detach()
            their_bias = self.head.bias
        weight, bias, (own, other) = head.weight, head.bias, (head.options, self.head.options)
        words = min(len(weight), len(their_weight))
        return linear_divergence(
            hidden,
            weight[:words],
            theirs,
            their_weight[:words],
            kind=config.divergence,
            temperature=config.temperature,
            mask=batch.target != IGNORE,
            bias=None if bias is None else bias[:words],
            scale=own.scale,
            softcap=own.softcap,
            teacher_bias=None if their_bias is None else their_bias[:words].detach(),
            teacher_scale=other.scale,
            teacher_softcap=other.softcap,
            memory_mib=config.memory.head_mib,
            backend=config.backend,
        )


def different(ours: dict[str, int], theirs: dict[str, int]) -> list[str]:
    """Tokens of `ours` whose id is another token's in `theirs`, or that have another id there.

    A token and an id that only one vocabulary has are no conflict.
    """
    by_id = {i: word for word, i in theirs.items()}
    return [w for w, i in ours.items() if theirs.get(w, i) != i or by_id.get(i, w) != w]


def load_teacher(config: RunConfig, policy: Policy, head: Head) -> Teacher | None:
    """The teacher that config.teacher names; None without one.

    ValueError if the tokenizers conflict, a head has LoRA, or questions have pictures.
    """
    if config.teacher is None:
        return None
    if policy.processor is not None:
        raise ValueError(
            "teacher: got questions with pictures; expected text alone, all that a teacher reads. "
            "Leave the pictures out."
        )
    loaded = load_policy(config.teacher, dtype=config.dtype)
    if other := different(policy.tokenizer.get_vocab(), loaded.tokenizer.get_vocab()):
        raise ValueError(
            f"teacher: got {config.teacher!r}, for which {len(other)} words such as {other[0]!r} "
            "are other tokens than for the student; expected the same. Choose a teacher with the "
            "student's tokenizer."
        )
    model = loaded.model.requires_grad_(False)
    settle_attention(model, config.memory.attention)
    teacher = Teacher(model, find_head(model))
    for name, found in (("teacher", teacher.head), ("student", head)):
        if found.lora is not None:
            raise ValueError(
                f"teacher: got LoRA on the {name}'s head; expected a plain one: a divergence takes "
                "no adapter. Merge it into the head."
            )
    return teacher
