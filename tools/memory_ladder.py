"""Peak memory of one update at growing context, each switch one row, predicted beside measured.

    python -m tools.memory_ladder --out DIR          a small model on the CPU
    python -m tools.memory_ladder --model FOLDER --out DIR    a pretrained model on the CPU
    python -m tools.memory_ladder --gpu --out DIR    Qwen2.5-1.5B's config, random bfloat16 weights,
                                                     all of them trained, on CUDA
    python -m tools.memory_ladder --dry --out DIR    the GPU's rows in tiny on the CPU: a rehearsal

Writes memory-ladder-{cpu,cpu-FOLDER,gpu,dry}.json, .md and .png; with --rows and --tokens only
these are measured, and the rest of the JSON stays. The rows are in tools/ladder_rows.py.

A row is a process of its own, on the CPU every point of it: the model is loaded, a tiny update
warms the libraries up and creates the optimiser's state, and then the peak of an update is counted
over the loaded model. The update has two micro-batches, because in training the gradients of the
first are there in the second. On the GPU the context is ONE sequence, save in the rows that say
otherwise; a short sequence is its first micro-batch. On the CPU resident memory is counted, with
malloc told to give every large block back (MALLOC_MMAP_THRESHOLD_); on CUDA
torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import riskpo.trainer.update
from riskpo.algorithms import LossOptions
from riskpo.config import MemoryConfig, RunConfig
from riskpo.memory_plan.budget import Workload, budget
from riskpo.memory_plan.model_shape import shape_of
from riskpo.memory_plan.peak_meter import PeakMeter
from riskpo.model.memory_switches import apply_switches
from riskpo.model.packing import IGNORE
from riskpo.trainer.optimizer import Optimizer
from riskpo.trainer.parallel import ParallelModel
from riskpo.trainer.update import update
from riskpo.types import Rollouts
from riskpo_kernels import TokenLogProbs
from riskpo_kernels.causal_lm import find_head
from tools.ladder_page import device_of, write
from tools.ladder_rows import CPU, DRY, EVERY, FUSED, GPU, LADDERS, Ladder, Row, pretrained
from tools.plain_transfers import PlainTransfers

SHORT = 64  # tokens of the warm-up
ROWS = 128  # of logits at a time, for an entropy without gradient
NO_GAPS = "expandable_segments:True"  # of CUDA's allocator, whose blocks then grow with a context


def measure(ladder: Ladder, row: Row, contexts: list[int]) -> Iterator[dict[str, Any]]:
    """Runs in the row's own process; bytes over the loaded model, one record for each context."""
    memory = memory_of(ladder, row)
    if memory.optimizer == "8bit":
        import bitsandbytes  # noqa: F401  its code and constants are not the optimiser's state
    torch.manual_seed(0)
    device = torch.device(ladder.device)
    model = build(ladder, row)
    meter = PeakMeter(device, model)
    second_place = PlainTransfers() if device.type == "cpu" else None
    apply_switches(model, memory, second_place)
    optimizer = Optimizer(
        model.parameters(),
        learning_rate=1e-6,
        warmup_steps=0,
        weight_decay=0.01,
        max_grad_norm=1.0,
        state=memory.optimizer,
    )
    if row.head != FUSED:
        riskpo.trainer.update.linear_logprob = partial(logprob_of_logits, row.head == EVERY)
    head, loss = find_head(model), LossOptions()
    for tokens in (SHORT, *contexts):
        batch = rollouts(tokens, row.sequences, model.config.vocab_size)
        plan = RunConfig(micro_batch_tokens=tokens, memory=memory)
        advantage = torch.linspace(0.5, 1, len(batch.tokens))  # none is 0: every response counts
        meter.restart()
        start = time.perf_counter()
        numbers = update(ParallelModel(model), head, optimizer, batch, advantage, loss, plan)
        if tokens in contexts:
            record = about_point(ladder, row, tokens) | {
                "device": device_of(ladder),
                "measured": meter.increase(),
                "gradient_norm": numbers["grad_norm"],
            }
            if device.type == "cuda":
                record["seconds"] = time.perf_counter() - start
            yield record | held_elsewhere(optimizer, memory, second_place)


def held_elsewhere(
    optimizer: Optimizer, memory: MemoryConfig, second_place: PlainTransfers | None
) -> dict[str, int]:
    """On the CPU: bytes of the increase that a GPU would have left on its host."""
    if second_place is None:
        return {}
    held = second_place.most
    if memory.optimizer == "host":
        copies = [
            m for m, w in zip(optimizer.masters, optimizer.weights, strict=True) if m is not w
        ]
        moments = [x for state in optimizer.adamw.state.values() for x in state.values()]
        # a master's gradient is as large as the master itself
        held += sum(2 * x.nbytes for x in copies) + sum(x.nbytes for x in moments)
    return {"of_it_in_second_place": held} if held else {}


def memory_of(ladder: Ladder, row: Row) -> MemoryConfig:
    return MemoryConfig(head_mib=ladder.head_mib, **row.memory)


def about_point(ladder: Ladder, row: Row, tokens: int) -> dict[str, Any]:
    """What is known of a point before it is measured: its row, and the plan's bytes by term."""
    memory, on_host = memory_of(ladder, row), ladder.device == "cpu"
    size = torch.finfo(getattr(torch, row.dtype)).bits // 8
    shape = shape_of(config_of(ladder), "ladder")
    work = Workload(
        tokens,
        bytes_per_weight=size,
        on_host=on_host,
        plain_head=row.head != FUSED,
        head_tokens=None if row.head == EVERY else responses(tokens, row.sequences),
    )
    found = budget(shape, memory, work)
    increase, terms = found.increase("update", "step"), {**found.fixed, **found.update}
    if memory.offload_checkpoints and on_host:
        # the plan of a model on the host parks nothing; here two copies come back besides
        back = 2.0 * tokens * shape.hidden * size
        increase, terms = increase + back, {**terms, "copies on their way back": back}
    return {
        "label": row.label,
        "over": row.over,
        "tokens": tokens,
        "sequences": row.sequences,
        "switches": {**row.memory, "head": row.head, "dtype": row.dtype},
        "predicted": increase,
        "terms": terms,
        "step": found.step,
    }


def logprob_of_logits(
    every: bool, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any
) -> TokenLogProbs:
    """linear_logprob as one writes it without a fused head, at temperature 1.

    every: the head meets the prompts' tokens too, as a model's own forward does. The entropy is
    taken without gradient and ROWS rows at a time: it adds nothing to the peak.
    """
    counted = target != IGNORE
    rows = torch.ones_like(counted) if every else counted
    logits = (hidden if every else hidden[rows]) @ weight.T
    taken = target[rows].clamp(min=0)[:, None]
    log_p = torch.log_softmax(logits.float(), -1)
    with torch.no_grad():
        entropy = torch.cat([-(x.exp() * x).sum(-1) for x in log_p.split(ROWS)])

    def spread(found: torch.Tensor) -> torch.Tensor:
        return found.new_zeros(target.shape).masked_scatter(rows, found)

    return TokenLogProbs(
        spread(log_p.gather(-1, taken)[:, 0]), spread(entropy), target.new_empty(0)
    )


def config_of(ladder: Ladder) -> Any:
    from transformers import AutoConfig

    values = ladder.config
    return AutoConfig.for_model(**values | {"max_position_embeddings": 2**20})


def build(ladder: Ladder, row: Row) -> Any:
    """The model in the row's dtype on the ladder's device, with its own weights or random ones."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, row.dtype)
    if ladder.folder:
        read = AutoModelForCausalLM.from_pretrained
        return read(ladder.folder, dtype=dtype, local_files_only=True)
    with torch.device(ladder.device):
        return AutoModelForCausalLM.from_config(config_of(ladder), dtype=dtype)


def responses(tokens: int, sequences: int) -> int:
    """Targets that count in the large micro-batch: half of every sequence is its response."""
    return sequences * (tokens // sequences // 2)


def rollouts(tokens: int, sequences: int, vocab: int) -> Rollouts:
    """Random prompts and responses, half and half, of two micro-batches.

    The second has `tokens` model inputs. The first is as large, or SHORT where the second is one
    sequence: that saves half of the time, and what counts of it is that its gradients are there.
    """
    made, second = Rollouts(), [tokens // sequences] * sequences
    first = second if sequences > 1 else [min(SHORT, tokens)]
    for size in (*first, *second):
        response = size // 2
        made.tokens.append(torch.randint(vocab, (size + 1,)))  # the last one is a target only
        made.prompt_len.append(size + 1 - response)
        made.logprob.append(torch.zeros(response))
        made.text.append("")
        made.truncated.append(False)
        made.question_id.append(str(len(made.question_id)))
    return made


def run(ladder: Ladder, row: Row, contexts: list[int]) -> Iterator[dict[str, Any]]:
    """The row in a fresh process: its records, and the end of its error if it has one."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", NO_GAPS)
    case = json.dumps([ladder.name, row.label, contexts])
    command = [sys.executable, "-m", "tools.memory_ladder", "--case", case]
    command += ["--model", ladder.folder] if ladder.folder else []
    left = list(contexts)
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process:
            for line in process.stdout or ():
                if line.startswith('{"label"'):  # a library may print too
                    yield json.loads(line)
                    left.pop(0)
        errors.seek(0)
        reason = errors.read().strip().rpartition("\n")[2][:200]
    if process.returncode:
        for tokens in left:
            yield about_point(ladder, row, tokens) | {"error": reason or "killed"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--gpu", action="store_true", help="1.5 billion weights on CUDA")
    kind.add_argument("--dry", action="store_true", help="the GPU's rows in tiny on the CPU")
    kind.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder, on the CPU")
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths of the context")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of the rows, from 0")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    own = pretrained(given.model) if given.model else None
    if given.case:
        name, label, contexts = json.loads(given.case)
        ladder = own or LADDERS[name]
        for record in measure(ladder, ladder.row(label), contexts):
            print(json.dumps(record), flush=True)
        return 0
    if given.gpu and not torch.cuda.is_available():
        print("--gpu needs a CUDA device; --dry rehearses it on the CPU", file=sys.stderr)
        return 2
    ladder = own or (GPU if given.gpu else DRY if given.dry else CPU)
    chosen = sorted(given.tokens or ladder.contexts)
    # what CUDA counts starts anew with every context; a process of the CPU grows
    parts = [[tokens] for tokens in chosen] if ladder.rows is CPU.rows else [chosen]
    failed = False
    for row in (ladder.rows[i] for i in given.rows or range(len(ladder.rows))):
        for contexts in parts:
            for record in run(ladder, row, contexts):
                print(json.dumps(record), flush=True)
                write(given.out, ladder, [record])  # a ladder that is cut short keeps what it has
                failed = failed or "error" in record
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
