"""The memory plan of a model of your own beside what an update, or a whole run, takes on the CPU.

    python -m tools.plan_model FOLDER [--tokens 512] [--only LABEL ...]
    python -m tools.plan_model FOLDER --train [SETTINGS]

FOLDER is a Hugging Face folder. Each row is a process of its own: the model is loaded, a short
update warms the libraries up, and the peak of the resident set of a second one over the loaded
model is read. With --train a `riskpo train` of two steps runs on one-digit sums, and what it
prints of its memory is shown; SETTINGS, in one string, come after the built-in ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from riskpo.algorithms import LossOptions
from riskpo.config import LoraConfig, MemoryConfig, RunConfig
from riskpo.memory_plan.budget import Workload, budget
from riskpo.memory_plan.model_shape import shape_of_model
from riskpo.memory_plan.peak_meter import PeakMeter
from riskpo.model.lora import attach_lora
from riskpo.model.memory_switches import apply_switches
from riskpo.trainer.optimizer import Optimizer
from riskpo.trainer.parallel import ParallelModel
from riskpo.trainer.update import update
from riskpo.types import Rollouts
from riskpo_kernels.causal_lm import find_head
from tools.plan_check import HEADER, fresh, line, train_on

SHORT = 32  # tokens of the warm-up
SEQUENCE = 64  # tokens of a sequence, half of them its response
TRAIN = (
    "--algorithm grpo --reward exact --steps 2 --questions-per-step 8 --responses-per-question 4 "
    "--max-response-tokens 32 --eval-every-steps 0 --eval-questions 5 --eval-samples 1 "
    "--save-every-steps 0 --memory.head-mib 64"
)


@dataclass(frozen=True)
class Row:
    """One line: settings of MemoryConfig, dtype, adapters, cuts."""

    label: str
    memory: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    rank: int = 0  # of LoRA; 0: all weights
    micro_batches: int = 1  # of `tokens` each


CKPT = {"checkpointing": True}
ROWS = (
    Row("no switch"),
    Row("no switch, two micro-batches", micro_batches=2),
    Row("checkpointing", CKPT),
    Row("checkpointing, two micro-batches", CKPT, micro_batches=2),
    Row("checkpointing, MLP in tiles", CKPT | {"mlp_tile_tokens": 64}),
    Row("masked attention", {"attention": "masked"}),
    Row("optimiser on the host", CKPT | {"optimizer": "host"}),
    Row("LoRA", rank=8),
    Row("LoRA, checkpointing", CKPT, rank=8),
    Row("bfloat16", dtype="bfloat16"),
    Row("bfloat16, checkpointing", CKPT, "bfloat16"),
    Row("bfloat16, LoRA", dtype="bfloat16", rank=8),
)


def rollouts(tokens: int, vocab: int) -> Rollouts:
    """Random sequences of SEQUENCE model inputs that are `tokens` together."""
    made = Rollouts()
    for i in range(max(tokens // SEQUENCE, 1)):
        response = SEQUENCE // 2
        made.tokens.append(torch.randint(vocab, (SEQUENCE + 1,)))
        made.prompt_len.append(SEQUENCE + 1 - response)
        made.logprob.append(torch.zeros(response))
        made.text.append("")
        made.truncated.append(False)
        made.question_id.append(str(i))
    return made


def measure(folder: str, row: Row, tokens: int) -> dict[str, Any]:
    """Bytes over the loaded model, measured and predicted; for a process of its own."""
    torch.manual_seed(0)
    dtype = getattr(torch, row.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    if row.rank:
        attach_lora(model, LoraConfig(rank=row.rank), 0)
    memory = MemoryConfig(head_mib=64, **row.memory)
    work = Workload(
        tokens,
        dtype.itemsize,
        on_host=True,
        head_tokens=tokens // 2,
        micro_batches=row.micro_batches,
    )
    planned = budget(shape_of_model(model), memory, work)
    meter = PeakMeter(torch.device("cpu"), model)
    apply_switches(model, memory)
    optimizer = Optimizer(
        model.parameters(),
        learning_rate=1e-6,
        warmup_steps=0,
        weight_decay=0.01,
        max_grad_norm=1.0,
        state=memory.optimizer,
    )
    head, plan = find_head(model), RunConfig(micro_batch_tokens=tokens, memory=memory)
    for size in (SHORT, tokens * row.micro_batches):
        batch = rollouts(size, model.config.get_text_config().vocab_size)
        advantage = torch.linspace(0.5, 1, len(batch.tokens))  # none is 0: every response counts
        meter.restart()
        update(ParallelModel(model), head, optimizer, batch, advantage, LossOptions(), plan)
    moment = max((planned.update, planned.step), key=lambda terms: sum(terms.values()))
    return {
        "measured": meter.increase(),
        "predicted": planned.increase("update", "step"),
        "terms": planned.fixed | moment,
    }


def run(folder: str, row: Row, tokens: int) -> dict[str, Any]:
    """The row in a fresh process."""
    case = ["--tokens", str(tokens), "--row", json.dumps(asdict(row))]
    said = fresh("-m", "tools.plan_model", folder, *case)
    found: dict[str, Any] = json.loads(said.rpartition("\n")[2])
    return found


def train_run(model: str, settings: str) -> list[str]:
    """The memory lines of a `riskpo train` on one-digit sums."""
    rows = [{"prompt": f"{a} + {b} =", "gold": str(a + b)} for a in range(10) for b in range(10)]
    with tempfile.TemporaryDirectory() as folder:
        sums = Path(folder, "sums.jsonl")
        sums.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return train_on(Path(model), sums, Path(folder, "run"), f"{TRAIN} {settings}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="a Hugging Face folder")
    parser.add_argument("--tokens", type=int, default=512, help="of an update")
    parser.add_argument("--only", nargs="+", help="labels of rows")
    parser.add_argument(
        "--train", nargs="?", const="", metavar="SETTINGS", help="a whole run, with these settings"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(measure(given.folder, Row(**json.loads(given.row)), given.tokens)))
        return
    if given.train is not None:
        print("riskpo train", TRAIN, given.train)
        print(*train_run(given.folder, given.train), sep="\n")
        return
    print(HEADER)
    for row in ROWS:
        if given.only is None or row.label in given.only:
            print(line(row.label, run(given.folder, row, given.tokens)), flush=True)


if __name__ == "__main__":
    main()
