"""What `riskpo plan` says of plain [tokens, vocab] logits and of sampling, beside what they take.

    python -m tools.plan_check [--out FILE.json]
    python -m tools.plan_check --train FOLDER

Each case is a process of its own on the CPU, with a model of random weights made from a config:
the model is loaded, a small turn of the same work warms the libraries up, and the peak of the
resident set over the loaded model is read, with malloc told to give every large block back.
The memory ladder measures the other switches (tools/memory_ladder.py). With --train a `riskpo
train` of two steps runs on such a model, and what it prints of its memory is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from riskpo.config import MemoryConfig
from riskpo.demo import build_questions, build_tokenizer
from riskpo.memory_plan.budget import MIB, Workload, budget
from riskpo.memory_plan.model_shape import shape_of
from riskpo.memory_plan.peak_meter import PeakMeter
from riskpo.model.load import Policy, prepare
from riskpo.model.memory_switches import apply_switches
from riskpo.rollout.generate import GenerateSampler
from riskpo.rollout.sampler import SamplingLimits
from riskpo.trainer.optimizer import Optimizer
from riskpo.types import Question

SIZES = {
    "model_type": "qwen2",
    "num_hidden_layers": 8,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 36864,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2**20,
}
# malloc gives a block of this size back at once, and the resident set follows the tensors
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
HEADER = "| case | measured, MiB | predicted, MiB | prediction off by |\n|---|---|---|---|"

TRAIN = (
    "--reward exact --steps 2 --questions-per-step 10 --responses-per-question 4 "
    "--max-prompt-tokens 40 --max-response-tokens 216 --micro-batch-tokens 2048 "
    "--eval-every-steps 0 --eval-questions 5 --eval-samples 1 --save-every-steps 0 "
    "--memory.head-mib 64"
)


@dataclass(frozen=True)
class Case:
    """An update on plain logits of `tokens` tokens, or `sequences` responses to long prompts."""

    label: str
    dtype: str = "float32"
    tokens: int = 0
    sequences: int = 0
    prompt: int = 0
    response: int = 0
    heads_of_keys: int = 2

    @property
    def work(self) -> Workload:
        size = 4 if self.dtype == "float32" else 2
        if self.tokens:
            return Workload(self.tokens, size, on_host=True, plain_head=True)
        context = self.prompt + self.response
        return Workload(1, size, self.sequences, context, self.prompt, on_host=True)


CASES = (
    Case("plain logits, float32", tokens=2048),
    Case("plain logits, bfloat16", "bfloat16", tokens=2048),
    Case("sampling, long responses", sequences=96, prompt=8, response=248, heads_of_keys=6),
    Case("sampling, long prompts", sequences=64, prompt=508, response=4, heads_of_keys=6),
    Case("sampling, long prompts, shared keys", sequences=64, prompt=508, response=4),
    Case("sampling, long prompts, bfloat16", "bfloat16", sequences=128, prompt=508, response=4),
)


def measure(case: Case) -> dict[str, Any]:
    """Bytes over the loaded model, measured and predicted; for a process of its own."""
    torch.manual_seed(0)
    values = SIZES | {"num_key_value_heads": case.heads_of_keys}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    memory = MemoryConfig(checkpointing=bool(case.tokens))
    planned = budget(shape_of(config, "check"), memory, case.work)
    meter = PeakMeter(torch.device("cpu"))
    if case.tokens:
        plain_updates(model, memory, (64, case.tokens), meter)
        predicted, terms = planned.increase("update", "step"), {**planned.fixed, **planned.update}
    else:
        sampled(model, case, meter)
        moment = max(("prompts", "sampling"), key=planned.moments.__getitem__)
        predicted, terms = planned.moments[moment], {moment: getattr(planned, moment)}
    return asdict(case) | {"measured": meter.increase(), "predicted": predicted, "terms": terms}


def plain_updates(
    model: Any, memory: MemoryConfig, sizes: tuple[int, ...], meter: PeakMeter
) -> None:
    """Two micro-batches and a step for each size, as one writes it without a fused head."""
    apply_switches(model, replace(memory, attention="masked"))  # one sequence needs no mask
    optimizer = Optimizer(
        model.parameters(), learning_rate=1e-6, warmup_steps=0, weight_decay=0.01, max_grad_norm=1.0
    )
    model.train()
    for tokens in sizes:
        meter.restart()
        for _ in range(2):
            ids = torch.randint(SIZES["vocab_size"], (1, tokens + 1))
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            logprob = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])
            loss = -logprob.mean()
            del logits, logprob
            loss.backward()
        optimizer.step(loss.detach())


def sampled(model: Any, case: Case, meter: PeakMeter) -> None:
    """Responses to prompts that all differ, the odd ones shorter and padded; few for a warm-up.

    So the plan is met at its worst: equal prompts are read once by most models.
    """
    tokenizer = build_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    policy = prepare(Policy(model, tokenizer))
    for sequences, prompt, response in ((4, 4, 2), (case.sequences, case.prompt, case.response)):
        meter.restart()
        limits = SamplingLimits(case.prompt, response)
        questions = [
            Question(str(i), f"{i:0{prompt - i % 2 * 2}d}", "0", "check") for i in range(sequences)
        ]
        GenerateSampler(policy, limits, sequences).sample(questions, 1, (0,))


def fresh(*arguments: str) -> str:
    """What `python ARGUMENTS` prints in a process that gives its memory back.

    RuntimeError with the end of its error where it fails.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **GIVES_BACK},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {(done.stderr or done.stdout)[-300:]}")
    return done.stdout.strip()


def run(case: Case) -> dict[str, Any]:
    """The case in a fresh process."""
    said = fresh("-m", "tools.plan_check", "--case", json.dumps(asdict(case)))
    found: dict[str, Any] = json.loads(said.rpartition("\n")[2])
    return found


def line(label: str, found: dict[str, Any]) -> str:
    """A row under HEADER."""
    measured, predicted = found["measured"], found["predicted"]
    numbers = f"{measured / MIB:.0f} | {predicted / MIB:.0f} | {predicted / measured - 1:+.0%}"
    return f"| {label} | {numbers} |"


def train_run(folder: Path) -> list[str]:
    """The memory lines of a `riskpo train` on sums; the model and the run are in `folder`."""
    torch.manual_seed(0)
    values = SIZES | {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": q.prompt, "gold": q.gold, "id": q.id} for q in build_questions(60, 0)]
    sums = folder / "sums.jsonl"
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return train_on(folder / "model", sums, folder / "run", TRAIN)


def train_on(model: Path, data: Path, run_dir: Path, settings: str) -> list[str]:
    """The memory lines of a `riskpo train`."""
    folders = ["--model", str(model), "--data", str(data), "--run-dir", str(run_dir)]
    said = fresh("-m", "riskpo", "train", *folders, *settings.split())
    return [line for line in said.splitlines() if line.startswith("memory")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the cases, from 0")
    parser.add_argument("--train", type=Path, metavar="FOLDER", help="a whole run, in here")
    given = parser.parse_args()
    if given.train:
        print("riskpo train", TRAIN)
        print(*train_run(given.train), sep="\n")
        return
    if given.case:
        print(json.dumps(measure(Case(**json.loads(given.case)))))
        return
    records = []
    print(HEADER)
    for case in (CASES[i] for i in given.only or range(len(CASES))):
        records.append(run(case))
        print(line(case.label, records[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
