"""Rollouts as batches: mini-batches of questions, micro-batches of tokens, packed end to end.

Sequences are packed without padding into one row of tokens; position ids restart at 0 with each.
riskpo/model/attention.py is told where they end; with any other attention, transformers builds a
[T, T] block-diagonal mask from the position ids. A model that mixes packed sequences is called once
per sequence (riskpo/model/isolation.py). The decoder's last hidden states go straight into the
fused head, so there is no [tokens, V] tensor.

R rollouts, T tokens of a micro-batch, S its sequences, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from riskpo.model.attention import Shared
from riskpo.model.isolation import packed_rows, packing_of, plain_row
from riskpo.model.vision import Inputs, vision_hidden_states
from riskpo.types import Rollouts, Support
from riskpo_kernels.causal_lm import decoder_of

IGNORE = -100


@dataclass(frozen=True)
class Packed:
    """Sequences end to end. A sequence of n tokens gives n - 1 inputs, each with its successor."""

    rows: list[int]  # [S] which rollouts these are
    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T], restarting at 0
    target: torch.Tensor  # [T], the next token, or IGNORE where that is part of the prompt
    cu_seqlens: torch.Tensor  # [S + 1] int32
    lengths: list[int]  # [S] the same on the CPU
    prompt_tokens: torch.Tensor  # [S] response tokens of all the rollouts of the same question
    support: Support | None = None  # (ids, offsets [T + 1]) of the words each target was drawn from
    shared: Shared | None = None  # if much of it is prompts that were there before
    beside: Inputs = field(default_factory=dict)  # of a prompt with pictures; S is then 1


def micro_batches(rollouts: Rollouts, rows: Sequence[int], budget: int) -> list[list[int]]:
    """`rows` cut, in order, into runs of at most `budget` input tokens.

    Sequences are never cut, since a sequence ratio needs all its tokens: one longer than the budget
    is alone in its run, and so is one with pictures.
    """
    cuts: list[list[int]] = []
    room = 0
    for row in rows:
        size = len(rollouts.tokens[row]) - 1
        alone = rollouts.question_id[row] in rollouts.inputs
        if not cuts or size > room or alone:
            cuts.append([])
            room = budget
        cuts[-1].append(row)
        room = 0 if alone else room - size
    return cuts


def pack(rollouts: Rollouts, rows: Sequence[int], device: torch.device) -> Packed:
    """The chosen rollouts as one row without padding."""
    lengths = [len(rollouts.tokens[row]) - 1 for row in rows]
    names = [rollouts.question_id[row] for row in rows]
    of_question = dict.fromkeys(names, 0)
    for name, response in zip(rollouts.question_id, rollouts.logprob, strict=True):
        if name in of_question:
            of_question[name] += len(response)
    whole = torch.cat([rollouts.tokens[row] for row in rows])
    size = torch.tensor(lengths)
    ends = size.cumsum(0)
    sequence = torch.arange(len(rows)).repeat_interleave(size)
    position = torch.arange(sum(lengths)) - (ends - size)[sequence]
    at = torch.arange(sum(lengths)) + sequence  # in `whole`, which has one token more of each row
    prompt = torch.tensor([rollouts.prompt_len[row] for row in rows])
    read: dict[tuple[int, ...], int] = {}
    prompts = (rollouts.tokens[row][: rollouts.prompt_len[row]].tolist() for row in rows)
    first = torch.tensor([read.setdefault(tuple(x), i) for i, x in enumerate(prompts)])
    shared = Shared.of(sequence, position, first, prompt)
    return Packed(
        list(rows),
        whole[at][None].to(device),
        position[None].to(device),
        whole[at + 1].masked_fill(position < prompt[sequence] - 1, IGNORE).to(device),
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        lengths,
        torch.tensor([of_question[name] for name in names], device=device),
        packed_support(rollouts, rows, device),
        shared and shared.to(device),
        rollouts.inputs.get(names[0], {}),
    )


def packed_support(rollouts: Rollouts, rows: Sequence[int], device: torch.device) -> Support | None:
    """linear_logprob's support of the packed targets; prompt targets have none."""
    if not rollouts.support:
        return None
    counts = [torch.zeros(1, dtype=torch.int64)]
    for row in rows:
        counts += [counts[0].new_zeros(rollouts.prompt_len[row] - 1), rollouts.support[row][1]]
    ids = torch.cat([rollouts.support[row][0] for row in rows])
    return ids.to(device), torch.cat(counts).cumsum(0).to(device)


def hidden_states(model: Any, batch: Packed) -> torch.Tensor:
    """Last hidden states [T, D]; packed if the model keeps sequences apart, else one by one.

    ValueError if the model is not a causal language model.
    """
    if batch.beside:
        return vision_hidden_states(model, batch.input_ids, batch.beside)
    decoder, packing = decoder_of(model), packing_of(model)
    if packing.reason is not None:
        rows = batch.input_ids.split(batch.lengths, dim=1)
        return torch.cat([plain_row(decoder, row) for row in rows])
    given = (packing, batch.cu_seqlens, batch.lengths, batch.shared if packing.shares else None)
    return packed_rows(decoder, batch.input_ids, batch.position_ids, *given)


def denominator(
    rollouts: Rollouts, rows: Sequence[int], aggregate: str, constant: float | None
) -> float:
    """The divisor of the mini-batch's summed terms, shared by all its micro-batches."""
    if aggregate == "token-mean":
        return float(sum(len(rollouts.logprob[row]) for row in rows))
    if aggregate == "sequence-sum-norm":
        if constant is None:
            raise ValueError("denominator: got constant=None; expected a number of tokens. Set it.")
        return len(rows) * constant
    if aggregate == "prompt-mean":
        return float(len({rollouts.question_id[row] for row in rows}))
    return float(len(rows))


def mini_batches(rollouts: Rollouts, count: int) -> list[list[int]]:
    """Rows of `count` mini-batches (fewer when there are fewer questions), whole questions each."""
    rows_of: dict[str, list[int]] = {}
    for row, question in enumerate(rollouts.question_id):
        rows_of.setdefault(question, []).append(row)
    groups = list(rows_of.values())
    count = min(count, len(groups))
    bounds = [i * len(groups) // count for i in range(count + 1)]
    return [sum(groups[a:b], []) for a, b in zip(bounds, bounds[1:], strict=False)]
