"""Does a model keep packed sequences apart? Tested on the model itself before training.

A layer that carries a state along the tokens (Mamba, linear attention, convolution, recurrence)
passes it from one packed sequence to the next, whatever the attention mask says. Two checks:

    `known_reach`   does the model have layers or settings whose reach a short trial cannot show?
    `_leak`         do three short sequences give the same values packed and alone, with a zero
                    gradient from each sequence to the others?

A model that fails runs its sequences one by one, in the same micro-batches, with one warning. On a
GPU its own packed path is tried first: kernels such as flash-linear-attention, causal-conv1d and
mamba-ssm take sequence bounds. That trial is longer than their chunks. A model whose tokens see
later ones is not causal and is refused.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from riskpo.model.attention import FLASH, SEQUENCES, Shared, choose, packed_keywords
from riskpo_kernels.causal_lm import decoder_of

log = logging.getLogger("riskpo")

TRIAL = (9, 7, 5)  # tokens of the sequences that are tried
KERNEL_TRIAL = (150, 90, 70)  # kernels work in chunks of 64 to 256 tokens
KERNEL_DEVICES = ("cuda", "xpu")
# Largest difference of packed and alone, relative to the largest value: rounding of another order
# of sums. In 16 bits, where a mixture of experts may also send a token elsewhere, for most tokens.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
ROUNDING_16, MOST = 0.1, 0.75
APART = {"full_attention", "sliding_attention", "attention", "global", "local", "full"}
APART |= {"mlp", "moe", "dense", "sparse"}  # token by token
STATES = re.compile(r"linear|conv|mamba|hybrid|recurrent|ssm|delta|rwkv")
STATE_MODULES = re.compile(
    r"Mamba|SSM|Recurrent|DeltaNet|DeltaAttention|LinearAttention|LightningAttention|ShortConv|Rwkv"
    r"|LSTM|GRU|Retention|KDA|TokenShift|GatedLinear"
)
# Attention that picks among blocks or chunks counted from the start of the row.
REACH_MODULES = re.compile(r"Indexer|Compressor|LSH|ChunkedAttention|BlockSparse|SparseAttention")
REACH_SETTINGS = (
    "attention_chunk_size", "index_topk", "indexer_budget", "lsh_attn_chunk_length",
    "local_attn_chunk_length",
)  # fmt: skip
LAYER_LISTS = ("layer_types", "layers_block_type", "block_types", "attention_layers")


@dataclass(frozen=True)
class Packing:
    """How sequences go through a model: packed if `reason` is None, else one by one."""

    reason: str | None = None
    own: bool = False  # packed by the model's own kernels, which want seq_idx as well
    shares: bool = False  # takes a packed row that has the prompts of its sequences once
    chosen: bool = True  # with the attention of `choose`; else with the model's own


_FOUND: weakref.WeakKeyDictionary[Any, tuple[str, Packing]] = weakref.WeakKeyDictionary()


def packing_of(model: Any) -> Packing:
    """How the model runs, tested at the first call and after a change of attention.

    ValueError for a model that is not a causal language model or whose decoder cannot be called.
    """
    implementation, packing = _FOUND.get(model, (None, Packing()))
    return packing if implementation == _implementation(model) else _found(model, _examine(model))


def settle_attention(model: Any, requested: str) -> Packing:
    """Set the attention of MemoryConfig.attention and test whether the model runs packed.

    With "auto", the model's own attention stays if the chosen one mixes packed sequences.
    """
    before = str(model.config._attn_implementation)
    model.set_attn_implementation(choose(requested, model))
    packing = _examine(model)
    if packing.reason is not None and requested == "auto" and _implementation(model) != before:
        model.set_attn_implementation(before)
        packing = replace(_examine(model), chosen=False)
    return _found(model, packing)


def adopt_packing(model: Any, requested: str, packing: Packing) -> None:
    """Use the result of a test before the weights moved, with the attention for their new device.

    A result that holds for one attention of riskpo/model/attention.py holds for all of them, but
    only sequence attention takes shared prompts.
    """
    if packing.chosen:
        model.set_attn_implementation(choose(requested, model))
    name = _implementation(model)
    _FOUND[model] = name, replace(packing, shares=packing.shares and name == SEQUENCES)


def _found(model: Any, packing: Packing) -> Packing:
    if packing.reason is not None:
        log.warning(
            "packing: %s runs one sequence at a time: %s", type(model).__name__, packing.reason
        )
    _FOUND[model] = _implementation(model), packing
    return packing


def _implementation(model: Any) -> str:
    return str(decoder_of(model).config._attn_implementation)


def known_reach(model: Any) -> tuple[str | None, bool]:
    """(what may leak between packed sequences, whether kernels with sequence bounds prevent it).

    Read from the config and the decoder's modules; (None, True) if nothing is known to leak.
    """
    decoder = decoder_of(model)
    config, modules = decoder.config, list(decoder.modules())
    lists = (getattr(config, name, None) for name in LAYER_LISTS)
    kinds = {str(kind) for x in lists if isinstance(x, (list, tuple)) for kind in x} - APART
    names = sorted({type(module).__name__ for module in modules})
    reach = sorted(kind for kind in kinds if not STATES.search(kind))
    reach += [name for name in names if REACH_MODULES.search(name)]
    reach += [name for name in REACH_SETTINGS if getattr(config, name, None)]
    if reach:
        return f"got {reach[0]}, which counts from the start of the row", False
    for name in sorted(_rope_types(getattr(config, "rope_parameters", None))):
        if "dynamic" in name or name == "longrope":
            return f"got rope of type {name}, which looks at the longest sequence", False
    states = sorted(kinds) + [name for name in names if STATE_MODULES.search(name)]
    states += sorted(type(m).__name__ for m in modules if isinstance(m, torch.nn.RNNBase))
    states += [
        "Conv1d" for m in modules if isinstance(m, torch.nn.Conv1d) and m.kernel_size != (1,)
    ]
    if states:
        return f"got {states[0]}, which carries a state along the tokens", True
    return None, True


def _rope_types(value: Any) -> set[str]:
    if not isinstance(value, dict):
        return set()
    own = {str(value[key]) for key in ("rope_type", "type") if value.get(key)}
    return own.union(*(_rope_types(part) for part in value.values()))


def _examine(model: Any) -> Packing:
    decoder = decoder_of(model)
    weight = decoder.get_input_embeddings().weight
    if hasattr(weight, "full_tensor"):
        return Packing("its weights are already spread over the processes and cannot be tried")
    was_training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with _shaken(decoder), torch.enable_grad():
            rows = _trial_rows(weight, TRIAL)
            alone = _alone(model, decoder, rows)
            reason, cuttable = known_reach(model)
            if reason is None:
                reason = _leak(decoder, rows, alone, Packing())
                return Packing(reason, shares=reason is None and _shares(decoder, rows))
            if not cuttable or weight.device.type not in KERNEL_DEVICES:
                return Packing(reason)
            rows = _trial_rows(weight, KERNEL_TRIAL)
            with torch.no_grad():
                alone = [plain_row(decoder, row) for row in rows]
            failed = _leak(decoder, rows, alone, Packing(own=True))
            return Packing(own=True) if failed is None else Packing(f"{reason} ({failed})")
    finally:
        for module, training in was_training.items():
            module.training = training


def _trial_rows(weight: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Token ids [1, n]; neither the first few, which are often special, nor the last."""
    vocab = weight.shape[0]
    ids = (torch.arange(sum(lengths)) * 7919 + 101) % max(vocab - 8, 1) + min(5, vocab - 1)
    return [row[None].to(weight.device) for row in ids.clamp(max=vocab - 1).split(list(lengths))]


def _alone(model: Any, decoder: Any, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states [n, D] of each row by itself; ValueError where a token sees later ones."""
    name = type(model).__name__
    try:
        with torch.no_grad():
            alone = [plain_row(decoder, row) for row in rows]
        with _embeddings(decoder) as seen:
            hidden = plain_row(decoder, torch.cat(rows[:2], 1))
            gradient = _gradient(hidden[: TRIAL[0]], seen)
    except Exception as error:  # of the model's own code, whatever it may be
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model: the decoder of a {name} cannot be run on a plain row of tokens ({reason}). "
            "This kind of model is not supported."
        ) from error
    later = gradient is not None and bool(gradient[TRIAL[0] :].ne(0).any())
    if later or not _close(hidden[: TRIAL[0]], alone[0]):
        raise ValueError(
            f"model: got a {name} whose tokens see later ones; expected a causal language model, "
            "which has no use for a token before it is sampled. Set is_decoder=True in its config "
            "where it has that."
        )
    return alone


def plain_row(decoder: Any, row: torch.Tensor) -> torch.Tensor:
    """Last hidden states [n, D] of one sequence, row [1, n], with nothing beside it."""
    hidden: torch.Tensor = decoder(input_ids=row, use_cache=False).last_hidden_state[0]
    return hidden


def packed_rows(
    decoder: Any,
    row: torch.Tensor,
    position_ids: torch.Tensor,
    packing: Packing,
    cu_seqlens: torch.Tensor,
    lengths: Sequence[int],
    shared: Shared | None = None,
) -> torch.Tensor:
    """Last hidden states [T, D] of sequences end to end, row [1, T]; `shared` if packing.shares.

    An attention mask or a cache would undo the packing in silence.
    """
    if shared is not None:
        row, position_ids = row[:, shared.unique], position_ids[:, shared.unique]
    given = packed_keywords(decoder.config._attn_implementation, cu_seqlens, lengths, shared)
    if packing.own:
        place = torch.arange(len(lengths), dtype=torch.int32, device=cu_seqlens.device)
        index = place.repeat_interleave(cu_seqlens.diff(), output_size=sum(lengths))
        given |= packed_keywords(FLASH, cu_seqlens, lengths) | {"seq_idx": index[None]}
    given |= {"position_ids": position_ids, "attention_mask": None, "use_cache": False}
    hidden: torch.Tensor = decoder(input_ids=row, **given).last_hidden_state[0]
    return hidden if shared is None else hidden.index_select(0, shared.place)


def _leak(
    decoder: Any, rows: list[torch.Tensor], alone: list[torch.Tensor], packing: Packing
) -> str | None:
    """Why packed rows differ from the same rows alone; None where they do not."""
    device, lengths = rows[0].device, [row.shape[1] for row in rows]
    places = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    try:
        with _embeddings(decoder) as seen:
            hidden = packed_rows(decoder, torch.cat(rows, 1), places, packing, bounds, lengths)
            parts = hidden.split(lengths)
            gradient = _gradient(parts[1], seen)
    except Exception as error:  # any model's code, and any reason of it not to take a packed row
        return f"it does not take a packed row: {' '.join(str(error).split())[:120]}"
    if gradient is None:
        return "its tokens' gradients cannot be followed"
    first, own, last = gradient.split(lengths)
    if bool(first.ne(0).any()) or bool(last.ne(0).any()) or not bool(own.ne(0).any()):
        return "a packed sequence sees its neighbour"
    if not all(_close(*pair) for pair in zip(parts, alone, strict=True)):
        return "a packed sequence has other hidden states than alone"
    return None


@torch.no_grad()
def _shares(decoder: Any, rows: list[torch.Tensor]) -> bool:
    """Whether a row that has a common beginning once gives what its sequences give alone."""
    if decoder.config._attn_implementation != SEQUENCES:
        return False
    prompt, device = rows[0][:, :5], rows[0].device
    rows = [rows[0], *(torch.cat([prompt, row], 1) for row in (rows[1][:, :4], rows[2]))]
    lengths = torch.tensor([row.shape[1] for row in rows])
    places = torch.cat([torch.arange(n) for n in lengths.tolist()])
    bounds = torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32, device=device)
    sequence = torch.arange(3).repeat_interleave(lengths)
    shared = Shared.of(sequence, places, torch.zeros(3, dtype=torch.int64), torch.full((3,), 5))
    assert shared is not None
    given = (bounds, lengths.tolist(), shared.to(device))
    try:
        whole, places = torch.cat(rows, 1), places[None].to(device)
        parts = packed_rows(decoder, whole, places, Packing(), *given).split(lengths.tolist())
        return all(_close(x, plain_row(decoder, row)) for x, row in zip(parts, rows, strict=True))
    except Exception:  # any model's code, and any reason of it not to take such a row
        return False


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether hidden states [n, D] are equal up to rounding; NaN is not."""
    limit = ROUNDING.get(theirs.dtype, ROUNDING_16)
    gap = (ours.detach().double() - theirs.double()).abs().amax(-1)
    good = gap <= limit * theirs.double().abs().max().clamp(min=1e-6)
    return bool(good.all() if theirs.dtype in ROUNDING else good.double().mean() >= MOST)


def _gradient(hidden: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor | None:
    """[T, width] of a weighted sum of `hidden` by the embedded tokens; None: none was seen."""
    if len(seen) != 1 or not hidden.requires_grad:
        return None
    weight = torch.linspace(0.5, 1.5, hidden.numel(), device=hidden.device).view_as(hidden)
    (found,) = torch.autograd.grad((hidden * weight).sum(), seen, allow_unused=True)
    return None if found is None else found.reshape(-1, found.shape[-1])


@contextmanager
def _embeddings(decoder: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the embedded tokens of every forward inside, as leaves of the graph."""
    seen: list[torch.Tensor] = []

    def leaf(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()  # some models go on in place

    hook = decoder.get_input_embeddings().register_forward_hook(leaf)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _shaken(decoder: Any) -> Iterator[None]:
    """Inside, parameters that are all 0 hold noise: a fresh gate or adapter would hide a path."""
    weights = (p for p in decoder.parameters() if p.is_floating_point() and p.numel())
    silent = [p for p in weights if not p.any()]
    with torch.no_grad():
        for i, p in enumerate(silent):
            g = torch.Generator(p.device).manual_seed(i)
            p.copy_(torch.randn(p.shape, generator=g, device=p.device) * 0.1)
    try:
        yield
    finally:
        with torch.no_grad():
            for p in silent:
                p.zero_()
