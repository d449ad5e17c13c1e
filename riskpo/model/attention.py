"""Attention over packed sequences without a [T, T] mask.

`choose` picks one of three implementations, which the model calls through transformers' attention
interface:

    flash_attention_2   the flash-attn package, which reads cu_seqlens itself
    riskpo_varlen       torch.nn.attention.varlen: CUDA, 16-bit
    riskpo_sequences    scaled_dot_product_attention, one sequence after the other: any device

Where sequences begin with one prompt, riskpo_sequences takes a row that has its tokens once, and
gives each sequence its prompt back: the rest of the model then computes these tokens once.

A packed batch is one row [1, T]. Without these, transformers builds a [T, T] mask from the position
ids, and its attention computes every pair. Both riskpo implementations leave sampling (a padded
batch with a mask, or a cache) to transformers' sdpa.

T tokens of the row, n of one sequence, nh and nkv heads of queries and of keys, hd their width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

FLASH, VARLEN, SEQUENCES = "flash_attention_2", "riskpo_varlen", "riskpo_sequences"
CHOICES = {"flash": FLASH, "varlen": VARLEN, "sequences": SEQUENCES, "masked": "sdpa"}
VARLEN_WIDTH = 256  # largest head that torch's kernel takes
TOGETHER = 512  # tokens: up to here a call costs more than a copy of what it reads
# torch 2.13 refuses fewer key heads than query heads unless enable_gqa is set. 2.11 lacks that
# argument and accepts them.
TELLS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def choose(requested: str, model: Any) -> str:
    """The attn_implementation for MemoryConfig.attention; ValueError if it cannot run the model.

    "auto" takes the first that device, dtype and layers allow: flash-attn, torch's varlen, sequence
    by sequence. If none does, the model keeps its own.
    """
    reasons = {name: _hindrance(name, model) for name in ("flash", "varlen", "sequences")}
    if requested == "auto":
        free = (CHOICES[name] for name, reason in reasons.items() if reason is None)
        return next(free, model.config._attn_implementation)
    if reasons.get(requested) is not None:
        raise ValueError(
            f"memory.attention={requested!r}: {reasons[requested]}. Set it to 'auto', or to "
            "'masked' for transformers' own mask."
        )
    return CHOICES[requested]


def _hindrance(name: str, model: Any) -> str | None:
    """Why an implementation cannot run this model on its device; None if it can."""
    if getattr(model.config, "vision_config", None) is not None:
        return "got a vision-language model, whose vision tower is not causal"
    config = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ())} - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        return f"got layers of {', '.join(sorted(kinds))}; expected full or sliding attention"
    if name != "flash" and getattr(config, "attn_logit_softcapping", None):
        # transformers 5.17's sdpa leaves the cap out in silence, 5.23's raises
        return "got a model that caps its attention logits, which torch's attention does not"
    if name == "sequences":
        known = getattr(model, "_supports_sdpa", True)
        return None if known else f"{type(model).__name__} does not run on torch's sdpa"
    if name == "flash" and not is_flash_attn_2_available():
        return "the package flash-attn is not installed, or there is no CUDA device"
    weight = next(model.parameters())
    if weight.device.type != "cuda" or weight.dtype not in (torch.bfloat16, torch.float16):
        return f"got {weight.dtype} on {weight.device.type}; expected 16-bit weights on CUDA"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the device is older than compute capability 8.0"
    if name == "varlen" and head_width(config) > VARLEN_WIDTH:
        return f"got heads of {head_width(config)}; expected at most {VARLEN_WIDTH}"
    return None


def head_width(config: Any) -> int:
    """Width of one attention head, as the family's config spells it."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class Shared:
    """A packed row of T tokens in which equal beginnings are computed once: U tokens."""

    unique: torch.Tensor  # [U] places in the packed row
    place: torch.Tensor  # [T] of each token of the packed row among them

    @staticmethod
    def of(
        sequence: torch.Tensor, position: torch.Tensor, first: torch.Tensor, prompt: torch.Tensor
    ) -> Shared | None:
        """None if less than a quarter of the row repeats, which the attention's copies would cost.

        sequence, position [T]: which sequence, and where in it. first, prompt [S]: the sequence
        whose first `prompt` tokens this one repeats, itself if it repeats none.
        """
        token, start = torch.arange(len(position)), (position == 0).nonzero()[:, 0]
        again = (position < prompt[sequence]) & (first[sequence] != sequence)
        if 4 * int(again.sum()) < len(again):
            return None
        source = torch.where(again, start[first[sequence]] + position, token)
        return Shared(token[~again], ((~again).cumsum(0) - 1)[source])

    def to(self, device: torch.device) -> Shared:
        return Shared(self.unique.to(device), self.place.to(device))


def packed_keywords(
    implementation: str,
    cu_seqlens: torch.Tensor,
    lengths: Sequence[int],
    shared: Shared | None = None,
) -> dict[str, Any]:
    """Keyword arguments that tell the attention where the sequences of a packed row end.

    cu_seqlens [S + 1] int32 on the device, lengths the same on the CPU (no sync per layer).
    """
    if implementation == SEQUENCES:
        told = {} if shared is None else {"shared_prompts": shared}
        return {"sequence_lengths": list(lengths), **told}
    if implementation in (FLASH, VARLEN):
        given = {"cu_seq_lens": cu_seqlens, "max_length": max(lengths)}
        return {f"{name}_{side}": x for name, x in given.items() for side in "qk"}
    return {}


def by_sequence(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sequence_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    shared_prompts: Shared | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """sdpa on each sequence of the row; query [1, nh, T, hd], key and value [1, nkv, T, hd].

    Returns [1, T, nh, hd]. Short sequences of equal length share a call, with the same bits as
    alone. With shared_prompts, the row has its U tokens. With a mask or a cache, transformers' own
    sdpa runs.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    total = query.shape[2]
    if sequence_lengths is None:
        if module.training:
            raise RuntimeError(
                f"attention: the lengths of the packed sequences did not reach "
                f"{type(module).__name__}, and {total} tokens would see each other. Its model "
                "drops keywords on the way; set memory.attention='masked'."
            )
        sequence_lengths = [total]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = _window(q.shape[2], sliding_window, q.device)
        return sdpa_attention_forward(module, q, k, v, mask, **options)[0]

    starts: dict[int, list[int]] = {}
    for n, end in zip(sequence_lengths, accumulate(sequence_lengths), strict=True):
        starts.setdefault(n, []).append(end - n)
    apart = max(starts) > TOGETHER or len(starts) == len(sequence_lengths)
    if apart and shared_prompts is None:
        cuts = [x.split(list(sequence_lengths), dim=2) for x in (query, key, value)]
        outs = [attend(*piece) for piece in zip(*cuts, strict=True)]
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)), None
    parts, places = [], []
    for n, first in starts.items():  # sequences of one length are a batch
        place = torch.tensor(first)[:, None] + torch.arange(n)
        at = place.flatten().to(query.device)
        source = at if shared_prompts is None else shared_prompts.place[at]
        batch = (
            x[0].index_select(1, source).unflatten(1, place.shape).transpose(0, 1)
            for x in (query, key, value)
        )
        parts.append(attend(*batch).flatten(0, 1))
        places.append(at)
    order = torch.cat(places).argsort()
    order = order if shared_prompts is None else order[shared_prompts.unique]
    return torch.cat(parts)[order][None], None


def _window(n: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """bool [n, n], True where a query sees a key; None: the whole past."""
    if sliding_window is None or n <= sliding_window:
        return None
    place = torch.arange(n, device=device)
    back = place[:, None] - place[None]
    return (back >= 0) & (back < sliding_window)


def by_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """torch's varlen kernel on the whole row; shapes as in by_sequence.

    Without cu_seqlens, or with a mask, it is by_sequence.
    """
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None:
        return by_sequence(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **options
        )
    if options.get("dropout") or options.get("softcap") is not None:
        raise ValueError(
            "attention: torch's varlen kernel has neither dropout nor softcap. Set "
            "memory.attention='masked'."
        )
    fewer: dict[str, Any] = {"enable_gqa": True} if TELLS and query.shape[1] != key.shape[1] else {}
    out: Any = varlen_attn(
        query[0].transpose(0, 1),  # [T, heads, hd]
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=options.get("scaling"),
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **fewer,
    )
    return out[None], None


def _no_mask(**given: Any) -> torch.Tensor | None:
    """No mask for a row without padding or cache: the attention knows its sequences."""
    plain = given["attention_mask"] is None and given["q_length"] == given["kv_length"]
    return None if plain and not given.get("use_vmap") else sdpa_mask(**given)


AttentionInterface.register(SEQUENCES, by_sequence)
AttentionInterface.register(VARLEN, by_varlen)
AttentionMaskInterface.register(SEQUENCES, _no_mask)
AttentionMaskInterface.register(VARLEN, _no_mask)
