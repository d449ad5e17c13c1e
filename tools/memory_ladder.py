"""Peak memory of one update at growing context, each switch one row, predicted beside measured.

    python tools/memory_ladder.py --out DIR           a small model on the CPU
    python tools/memory_ladder.py --gpu --out DIR     Qwen2.5-1.5B's config, random bfloat16
                                                      weights, all of them trained, on CUDA

Writes memory-ladder-{cpu,gpu}.json, .md and .png; with --rows and --tokens only these are measured,
and the rest of the JSON stays. Every row is a process of its own: the model is loaded, a tiny
update warms the libraries up and creates the optimiser's state, and then the peak of one full
update (two micro-batches of that many tokens, optimiser step) at each context, the shortest first,
is counted over the loaded model. On the CPU that is resident memory, with malloc told to give every
large block back (MALLOC_MMAP_THRESHOLD_); on CUDA torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MIB, GIB = 2**20, 2**30
SMALL = {
    "model_type": "qwen2",
    "num_hidden_layers": 8,
    "hidden_size": 384,
    "intermediate_size": 2048,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 36864,
    "tie_word_embeddings": False,
}
MICRO_BATCHES = 2  # as the plan assumes: the first one's gradients are there in the second
SEQUENCES = 4  # of a quarter of a micro-batch each; a single one would need no mask
RESPONSE = 8  # of a sequence's tokens one in so many is a response; the rest is prompt
CKPT = {"checkpointing": True}
TILED: dict[str, Any] = {**CKPT, "mlp_tile_tokens": 512}
CPU_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("transformers' own [T, T] mask", {"attention": "masked"}),
    ("attention by sequence", {}),
    ("+ checkpointing", CKPT),
    ("+ checkpoints in a second place", {**CKPT, "offload_checkpoints": True}),
    ("checkpointing + MLP in tiles of 512", TILED),
    ("+ 8-bit moments", {**TILED, "optimizer": "8bit"}),
    # float32 weights on a CPU are their own masters: with them "host" is the row of tiles
    ("bfloat16 weights, tiles of 512", {**TILED, "dtype": "bfloat16"}),
    ("bfloat16, optimiser on the host", {**TILED, "optimizer": "host", "dtype": "bfloat16"}),
]
GPU_TILED: dict[str, Any] = {
    **CKPT,
    "offload_checkpoints": True,
    "mlp_tile_tokens": 4096,
    "dtype": "bfloat16",
}
GPU_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("checkpointing", {**CKPT, "dtype": "bfloat16"}),
    ("+ checkpoints on the host", {**GPU_TILED, "mlp_tile_tokens": 0}),
    ("+ MLP in tiles of 4096", GPU_TILED),
    ("+ optimiser on the host", {**GPU_TILED, "optimizer": "host"}),
]


@dataclass(frozen=True)
class Case:
    """One row; `switches` are fields of MemoryConfig, and the dtype of the weights."""

    label: str
    contexts: list[int]  # tokens of one micro-batch, growing
    gpu: bool = False
    switches: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return str(self.switches.get("dtype", "float32"))


def measure(case: Case) -> Iterator[dict[str, Any]]:
    """Runs in the row's own process; bytes over the loaded model, one record for each context."""
    import torch

    from riskpo.config import MemoryConfig
    from riskpo.head import find_head
    from riskpo.memory.host_checkpoints import PlainTransfers
    from riskpo.memory.meter import PeakMeter
    from riskpo.memory.switches import apply_switches
    from riskpo.optimizer import Optimizer
    from riskpo.strategies import LossOptions
    from riskpo.update import UpdatePlan, update

    device = torch.device("cuda" if case.gpu else "cpu")
    switches = {name: value for name, value in case.switches.items() if name != "dtype"}
    memory = MemoryConfig(head_mib=300 if case.gpu else 32, **switches)
    if memory.optimizer == "8bit":
        import bitsandbytes  # noqa: F401  its code and constants are not the optimiser's state
    torch.manual_seed(0)
    config, model = build(device, getattr(torch, case.dtype))
    meter = PeakMeter(device)
    second_place = None if case.gpu else PlainTransfers()
    apply_switches(model, memory, second_place)
    optimizer = Optimizer(
        model.parameters(),
        learning_rate=1e-6,
        warmup_steps=0,
        weight_decay=0.01,
        max_grad_norm=1.0,
        state=memory.optimizer,
    )
    head, loss = find_head(model), LossOptions()
    advantage = torch.linspace(-1, 1, MICRO_BATCHES * SEQUENCES)
    for tokens in (64, *case.contexts):
        batch = rollouts(tokens, model.config.vocab_size)
        plan = UpdatePlan(micro_batch_tokens=tokens, memory_mib=memory.head_mib)
        meter.restart()
        numbers = update(model, head, optimizer, batch, advantage, loss, plan)
        if tokens in case.contexts:
            parked = second_place.most if second_place and second_place.most else None
            yield {
                "label": case.label,
                "tokens": tokens,
                "switches": case.switches,
                "measured": meter.increase(),
                **predict(config, memory, case, tokens),
                "gradient_norm": numbers["grad_norm"],
                **({"in_second_place": parked} if parked else {}),
            }


def predict(config: Any, memory: Any, case: Case, tokens: int) -> dict[str, Any]:
    """The plan of a row at one context: bytes over the loaded model, and its terms."""
    from riskpo.memory.budget import Workload, budget
    from riskpo.memory.shapes import shape_of

    size = 4 if case.dtype == "float32" else 2
    work = Workload(tokens, bytes_per_weight=size, on_host=not case.gpu)
    shape = shape_of(config, "ladder")
    found = budget(shape, memory, work)
    increase, terms = found.update_increase, {**found.fixed, **found.update}
    if memory.offload_checkpoints and not case.gpu:
        # the plan of a model on the host parks nothing; here two copies come back besides
        back = 2.0 * tokens * shape.hidden * size
        increase, terms = increase + back, {**terms, "copies on their way back": back}
    return {"predicted": increase, "terms": terms, "step": found.step}


def build(device: Any, dtype: Any) -> tuple[Any, Any]:
    """(config, model) with random weights of a torch dtype, on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from riskpo.memory.shapes import KNOWN

    sizes = dict(KNOWN["Qwen2.5-1.5B"] if device.type == "cuda" else SMALL)
    config = AutoConfig.for_model(sizes.pop("model_type"), max_position_embeddings=2**20, **sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return config, model


def rollouts(tokens: int, vocab: int) -> Any:
    """Random responses to long prompts, SEQUENCES of them `tokens` model inputs together."""
    import torch

    from riskpo.records import Rollouts

    made, size = Rollouts(), tokens // SEQUENCES + 1
    prompt = size - size // RESPONSE
    for i in range(MICRO_BATCHES * SEQUENCES):
        made.tokens.append(torch.randint(vocab, (size,)))
        made.prompt_len.append(prompt)
        made.logprob.append(torch.zeros(size - prompt))
        made.text.append("")
        made.truncated.append(False)
        made.question_id.append(str(i))
    return made


def run(case: Case) -> Iterator[dict[str, Any]]:
    """The row in a fresh process: its records, and the end of its error if it has one."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    left = list(case.contexts)
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
        same = {"label": case.label, "switches": case.switches, "error": reason or "killed"}
        yield from ({**same, "tokens": tokens} for tokens in left)


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

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    for i, label in enumerate(dict.fromkeys(r["label"] for r in records)):
        rows = [r for r in records if r["label"] == label and "error" not in r]
        x = [r["tokens"] for r in rows]
        style: dict[str, Any] = {
            "color": f"C{i}",
            "linestyle": ("-", "--")[i % 2],
        }  # some lie on each other
        axes.plot(x, [r["predicted"] / unit for r in rows], label=label, **style)
        axes.plot(x, [r["measured"] / unit for r in rows], "ox"[i % 2], color=f"C{i}")
    axes.set(
        xlabel="tokens of a micro-batch",
        ylabel=f"peak over the loaded model, {name}",
        title="points measured, lines predicted",
        ylim=(0, None),
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def kept_records(path: Path, about: dict[str, Any], measured: list[Any]) -> list[dict[str, Any]]:
    """Records of an earlier run on the same model that were not measured again."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["about"]["model"] != about["model"]:
        return []
    again = {(r["label"], r["tokens"]) for r in measured}
    return [r for r in earlier["records"] if (r["label"], r["tokens"]) not in again]


def write(given: argparse.Namespace, measured: list[dict[str, Any]]) -> None:
    """The three files, rows in the order of the ladder."""
    from importlib.metadata import version

    unit, name = (GIB, "GiB") if given.gpu else (MIB, "MiB")
    stem = given.out / f"memory-ladder-{'gpu' if given.gpu else 'cpu'}"
    given.out.mkdir(parents=True, exist_ok=True)
    about = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "model": "Qwen2.5-1.5B" if given.gpu else SMALL,
    }
    order = [label for label, _ in (GPU_ROWS if given.gpu else CPU_ROWS)]
    records = measured + kept_records(Path(f"{stem}.json"), about, measured)
    records.sort(key=lambda r: (order.index(r["label"]), r["tokens"]))
    text = json.dumps({"about": about, "records": records}, indent=1)
    Path(f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    Path(f"{stem}.md").write_text(table(records, unit, name), encoding="utf-8")
    picture(records, unit, name, Path(f"{stem}.png"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of the rows, from 0")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        for record in measure(Case(**json.loads(given.case))):
            print(json.dumps(record), flush=True)
        return 0
    if given.gpu:
        import torch

        if not torch.cuda.is_available():
            print("--gpu needs a CUDA device; leave it out to run on the CPU", file=sys.stderr)
            return 2
    rows = GPU_ROWS if given.gpu else CPU_ROWS
    contexts = given.tokens or ([2**15, 2**16, 2**17] if given.gpu else [1024, 2048, 4096, 8192])
    failed = False
    for label, switches in (rows[i] for i in given.rows or range(len(rows))):
        for record in run(Case(label, sorted(contexts), given.gpu, switches)):
            print(json.dumps(record), flush=True)
            write(given, [record])  # a long ladder that is cut short keeps what it has
            failed = failed or "error" in record
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
