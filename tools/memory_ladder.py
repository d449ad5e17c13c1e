"""Peak memory of one update at growing context, each switch one row, predicted beside measured.

    python tools/memory_ladder.py --out results/      a small float32 model on the CPU
    python tools/memory_ladder.py --gpu --out DIR     Qwen2.5-1.5B's config, random bfloat16
                                                      weights, all of them trained, on CUDA

Writes memory-ladder-{cpu,gpu}.json, .md and .png. Every row is a process of its own: the model is
loaded, a tiny update warms the libraries up and creates the optimiser's state, and the peak of one
full update (forward, backward, optimiser step) is counted over the loaded model. On the CPU that
is resident memory, with malloc told to give every large block back (MALLOC_MMAP_THRESHOLD_); on
CUDA torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MIB, GIB = 2**20, 2**30
SMALL = {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32768,
    "tie_word_embeddings": False,
}
SEQUENCES = 2  # of half the context each: one alone would need no mask in any case
CPU_ROWS = [
    ("transformers' own [T, T] mask", {"attention": "masked"}),
    ("attention by sequence", {}),
    ("+ checkpointing", {"checkpointing": True}),
    ("+ MLP in tiles of 512", {"checkpointing": True, "mlp_tile_tokens": 512}),
    (
        "+ 8-bit moments",
        {"checkpointing": True, "mlp_tile_tokens": 512, "optimizer": "8bit"},
    ),
]
TILED = {"checkpointing": True, "offload_checkpoints": True, "mlp_tile_tokens": 4096}
GPU_ROWS = [
    ("checkpointing", {"checkpointing": True}),
    ("+ checkpoints on the host", {"checkpointing": True, "offload_checkpoints": True}),
    ("+ MLP in tiles of 4096", TILED),
    ("+ optimiser on the host", {**TILED, "optimizer": "host"}),
]


@dataclass(frozen=True)
class Case:
    """One row at one context."""

    label: str
    tokens: int
    gpu: bool = False
    switches: dict[str, Any] = field(default_factory=dict)


def measure(case: Case) -> dict[str, Any]:
    """Runs in the row's own process; bytes over the loaded model."""
    import torch

    from riskpo.config import MemoryConfig
    from riskpo.head import find_head
    from riskpo.memory.budget import Workload, budget
    from riskpo.memory.meter import PeakMeter
    from riskpo.memory.shapes import shape_of
    from riskpo.memory.switches import apply_switches
    from riskpo.optimizer import Optimizer
    from riskpo.strategies import LossOptions
    from riskpo.update import UpdatePlan, update

    device = torch.device("cuda" if case.gpu else "cpu")
    memory = MemoryConfig(head_mib=300 if case.gpu else 32, **case.switches)
    torch.manual_seed(0)
    config, model = build(device, case.gpu)
    meter = PeakMeter(device)
    apply_switches(model, memory)
    optimizer = Optimizer(
        model.parameters(),
        learning_rate=1e-6,
        warmup_steps=0,
        weight_decay=0.01,
        max_grad_norm=1.0,
        state=memory.optimizer,
    )
    head, loss = find_head(model), LossOptions()
    plan = UpdatePlan(micro_batch_tokens=case.tokens, memory_mib=memory.head_mib)
    advantage = torch.linspace(-1, 1, SEQUENCES)
    update(model, head, optimizer, rollouts(64, model.config.vocab_size), advantage, loss, plan)
    meter.restart()
    began = time.process_time(), time.perf_counter()
    batch = rollouts(case.tokens, model.config.vocab_size)
    update(model, head, optimizer, batch, advantage, loss, plan)
    seconds = time.process_time() - began[0], time.perf_counter() - began[1]
    work = Workload(case.tokens, bytes_per_weight=2 if case.gpu else 4, on_host=not case.gpu)
    terms = budget(shape_of(config, "ladder"), memory, work)
    return {
        "measured": meter.increase(),
        "predicted": terms.update_increase,
        "terms": {**terms.fixed, **terms.update},
        "cpu_s": seconds[0],
        "wall_s": seconds[1],
    }


def build(device: Any, gpu: bool) -> tuple[Any, Any]:
    """(config, model) with random weights, on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from riskpo.memory.shapes import KNOWN

    sizes = dict(KNOWN["Qwen2.5-1.5B"] if gpu else SMALL)
    config = AutoConfig.for_model(sizes.pop("model_type"), max_position_embeddings=2**20, **sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if gpu else torch.float32
        )
    return config, model


def rollouts(tokens: int, vocab: int) -> Any:
    """SEQUENCES random responses to a short prompt, `tokens` model inputs together."""
    import torch

    from riskpo.records import Rollouts

    made, prompt = Rollouts(), 8
    for i in range(SEQUENCES):
        size = tokens // SEQUENCES + 1
        made.tokens.append(torch.randint(vocab, (size,)))
        made.prompt_len.append(prompt)
        made.logprob.append(torch.zeros(size - prompt))
        made.text.append("")
        made.truncated.append(False)
        made.question_id.append(str(i))
    return made


def run(case: Case) -> dict[str, Any]:
    """The case in a fresh process; what it printed, or the end of its error."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(asdict(case))],
        capture_output=True,
        text=True,
        env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **environment},
    )
    if done.returncode:
        return {"error": done.stderr.strip().rpartition("\n")[2][:200]}
    return dict(json.loads(done.stdout.strip().rpartition("\n")[2]))


def table(records: list[dict[str, Any]], unit: float, name: str) -> str:
    """Markdown, one line per row and context."""
    lines = [
        f"| switches | tokens | measured, {name} | predicted, {name} | prediction off by |",
        "|---|---|---|---|---|",
    ]
    for r in records:
        start = f"| {r['label']} | {r['tokens']:,} |"
        if "error" in r:
            lines.append(f"{start} {r['error']} | | |")
            continue
        error = r["predicted"] / r["measured"] - 1
        lines.append(
            f"{start} {r['measured'] / unit:.0f} | {r['predicted'] / unit:.0f} | {error:+.0%} |"
        )
    return "\n".join(lines) + "\n"


def picture(records: list[dict[str, Any]], unit: float, name: str, path: Path) -> None:
    """Measured as points, predicted as lines, one colour per row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label in dict.fromkeys(r["label"] for r in records):
        rows = [r for r in records if r["label"] == label and "error" not in r]
        x = [r["tokens"] for r in rows]
        (line,) = axes.plot(x, [r["predicted"] / unit for r in rows], label=label)
        axes.plot(x, [r["measured"] / unit for r in rows], "o", color=line.get_color())
    axes.set(
        xlabel="tokens of one update",
        ylabel=f"peak over the loaded model, {name}",
        title="points measured, lines predicted",
        ylim=(0, None),
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of the rows, from 0")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(Case(**json.loads(given.case)))))
        return 0
    rows = GPU_ROWS if given.gpu else CPU_ROWS
    contexts = given.tokens or ([2**15, 2**16, 2**17] if given.gpu else [2048, 4096, 8192])
    records = []
    for index, (label, switches) in enumerate(rows):
        for tokens in contexts:
            if given.rows is None or index in given.rows:
                found = run(Case(label, tokens, given.gpu, switches))
                records.append({"label": label, "tokens": tokens, "switches": switches, **found})
                print(json.dumps(records[-1]), flush=True)
    unit, name = (GIB, "GiB") if given.gpu else (MIB, "MiB")
    stem = given.out / f"memory-ladder-{'gpu' if given.gpu else 'cpu'}"
    given.out.mkdir(parents=True, exist_ok=True)
    about = {"platform": platform.platform(), "python": platform.python_version()}
    text = json.dumps({"about": about, "records": records}, indent=1)
    Path(f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    Path(f"{stem}.md").write_text(table(records, unit, name), encoding="utf-8")
    picture(records, unit, name, Path(f"{stem}.png"))
    return int(any("error" in r for r in records))


if __name__ == "__main__":
    sys.exit(main())
