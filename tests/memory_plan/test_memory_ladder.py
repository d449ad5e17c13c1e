"""The ladder of tools/memory_ladder.py: rows one switch apart, micro-batches as they are meant, a
head of whole logits that is the trainer's own loss, and the GPU's rows rehearsed on the CPU."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from importlib.metadata import version

import pytest
import torch

from riskpo.config import MemoryConfig
from riskpo.model.packing import IGNORE, micro_batches
from riskpo_kernels import linear_logprob
from tools import ladder_page, memory_ladder
from tools.ladder_rows import CPU, DRY, FUSED, GPU, LADDERS
from tools.memory_ladder import about_point, logprob_of_logits, memory_of, responses, rollouts


def switches(ladder, row):
    return {**asdict(memory_of(ladder, row)), "head": row.head, "sequences": row.sequences}


@pytest.mark.parametrize("ladder", LADDERS.values(), ids=["small", "large", "rehearsal"])
def test_a_row_is_one_switch_away_from_the_row_it_stands_over(ladder):
    for row in ladder.rows:
        if row.over is None:
            continue
        ours, theirs = switches(ladder, row), switches(ladder, ladder.row(row.over))
        assert sum(ours[key] != theirs[key] for key in ours) == 1, row.label
        assert row.dtype == ladder.row(row.over).dtype


@pytest.mark.parametrize("ladder", [CPU, GPU], ids=["small", "large"])
def test_every_switch_has_a_row(ladder):
    plain = asdict(MemoryConfig(head_mib=ladder.head_mib))
    turned = {
        k for row in ladder.rows for k, v in switches(ladder, row).items() if v != plain.get(k)
    }
    assert turned == {
        "attention",
        "checkpointing",
        "offload_checkpoints",
        "mlp_tile_tokens",
        "optimizer",
        "head",
        "sequences",
    }
    states = {memory_of(ladder, row).optimizer for row in ladder.rows}
    assert states == {"device", "8bit", "host"}


def test_on_the_gpu_a_context_is_one_sequence():
    """32k to 128k of Qwen2.5-1.5B in bfloat16; rows of several sequences say so."""
    assert GPU.device == "cuda" and GPU.config["hidden_size"] == 1536
    assert GPU.contexts == (32768, 65536, 131072)
    for row in GPU.rows:
        assert row.dtype == "bfloat16"
        assert row.sequences == 1 or f"{row.sequences} sequences" in row.label
    assert sum(row.sequences == 1 for row in GPU.rows) >= 8


@pytest.mark.parametrize(
    "tokens, sequences", [(64, 1), (4096, 1), (131072, 1), (64, 16), (2048, 4)]
)
def test_the_second_micro_batch_is_the_whole_context(tokens, sequences):
    made = rollouts(tokens, sequences, 100)
    parts = micro_batches(made, range(len(made.tokens)), tokens)
    sizes = [[len(made.tokens[i]) - 1 for i in part] for part in parts]
    assert sizes[1] == [tokens // sequences] * sequences and len(sizes) == 2
    assert sum(sizes[0]) == (tokens if sequences > 1 else 64)
    counted = sum(len(made.logprob[i]) for i in parts[1])
    assert counted == responses(tokens, sequences) == tokens // 2
    for tokens_of, prompt, sampled in zip(made.tokens, made.prompt_len, made.logprob, strict=True):
        assert len(tokens_of) == prompt + len(sampled)


@pytest.mark.parametrize("every", [True, False])
def test_log_probs_of_whole_logits_are_the_trainer_s(every):
    torch.manual_seed(0)
    target = torch.randint(50, (300,))
    target[torch.rand(300) < 0.5] = IGNORE
    found = []
    for op in (partial(logprob_of_logits, every), linear_logprob):
        torch.manual_seed(1)
        hidden = torch.randn(300, 16, requires_grad=True)
        weight = torch.randn(50, 16, requires_grad=True)
        token = op(hidden, weight, target, memory_mib=8, return_entropy=True)
        counted = target != IGNORE
        (token.logprob[counted] * torch.randn(int(counted.sum()))).sum().backward()
        found.append([token.logprob[counted], token.entropy[counted], hidden.grad, weight.grad])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_plan_of_a_row_follows_its_switches():
    """Of the GPU's rows without a GPU: by the plan no switch costs memory on one long sequence."""
    at = {row.label: about_point(GPU, row, 131072) for row in GPU.rows}
    for row in GPU.rows:
        assert at[row.label]["predicted"] > 0 and at[row.label]["sequences"] == row.sequences
        if row.over is not None and row.sequences == 1:
            assert at[row.label]["predicted"] < at[row.over]["predicted"], row.label
    logits = [at[row.label]["terms"]["head workspace"] for row in GPU.rows if row.head != FUSED]
    every, twice, half = logits
    assert every == twice
    assert every - half == pytest.approx(65536 * 14 * 151936)


def test_the_gpu_s_rows_rehearsed(monkeypatch):
    """Every row on a tiny model on the CPU. The loss is the same whatever is switched, so the norm
    of the gradients is too, to bfloat16's rounding."""
    norms = {}
    for row in DRY.rows:
        if row.memory.get("optimizer") == "8bit":
            continue
        monkeypatch.setattr("riskpo.trainer.update.linear_logprob", linear_logprob)
        [record] = memory_ladder.measure(DRY, row, [256])
        assert record["label"] == row.label and record["tokens"] == 256
        assert record["measured"] is None or record["measured"] >= 0
        norms.setdefault(row.sequences, []).append(record["gradient_norm"])
        assert ("of_it_in_second_place" in record) == bool(
            row.memory.get("offload_checkpoints") or row.memory.get("optimizer") == "host"
        )
    for group in norms.values():
        assert group == pytest.approx([group[0]] * len(group), rel=0.02)
    assert {len(group) for group in norms.values()} == {7, 2}


def records():
    found = []
    for row in DRY.rows:
        for tokens in DRY.contexts:
            size = 2**20 * (900 - 10 * len(found))
            found.append(
                {"label": row.label, "tokens": tokens, "measured": size, "predicted": size * 1.05}
            )
    return found


def test_tables_say_what_was_measured():
    found = records()
    del found[1]["measured"]
    found[1] |= {"error": "torch.OutOfMemoryError: CUDA out of memory.", "predicted": 2.0**30}
    points = ladder_page.points_table(DRY, found).splitlines()
    assert points[0] == "| MiB over the loaded model | 256 | 512 |"
    assert points[2] == "| logits of every token | 900 (+5%) | out of memory (plan 1,024) |"
    gains = ladder_page.gains_table(DRY, found).splitlines()
    assert gains[0] == "| row | over | MiB less at 256 | 512 |"
    assert gains[2] == "| + checkpointing | logits of every token | 20, 2% (21) | - |"
    assert len(gains) == 1 + len(DRY.rows)


def test_points_are_added_to_what_was_measured_before(tmp_path):
    first, *rest = records()
    ladder_page.write(tmp_path, DRY, rest)
    ladder_page.write(tmp_path, DRY, [first | {"measured": 7.0}])
    kept = json.loads((tmp_path / "memory-ladder-dry.json").read_text())
    assert [r["measured"] for r in kept["records"]] == [7.0, *(r["measured"] for r in rest)]
    assert kept["about"]["command"] == "python -m tools.memory_ladder --dry"
    assert kept["about"]["packages"]["torch"] == version("torch")
    assert (tmp_path / "memory-ladder-dry.png").stat().st_size > 0
