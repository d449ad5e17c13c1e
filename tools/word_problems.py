"""`python -m tools.word_problems MODEL FOLDER`: a model that sometimes solves word problems.

Writes FOLDER/train.jsonl and FOLDER/held-out.jsonl, problems of four kinds that share no numbers,
and FOLDER/start, MODEL after supervised steps on other problems of these kinds: until then
SmolLM2-135M answers with a sentence that is cut off. `riskpo compare docs/evidence-llm.toml`
starts there. Needs no network; about five minutes of a core.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from riskpo_kernels import add_fused_lm_head

NAMES, THINGS = ("Tom", "Anna", "Ben", "Mia"), ("eggs", "books", "cards", "coins")
KINDS = {  # stratum: text, answer, from what to what its numbers go
    "gets": ("{} has {} {} and gets {}. How many?", lambda a, b: a + b, (1, 8), (1, 8)),
    "loses": ("{} has {} {} and loses {}. How many?", lambda a, b: a - b, (7, 16), (1, 6)),
    "gets 2+1": ("{} has {} {} and gets {}. How many?", lambda a, b: a + b, (11, 29), (2, 8)),
    "each": ("{} has {} boxes of {} {}. How many?", lambda a, b: a * b, (2, 9), (2, 9)),
}
WARM, HELD_OUT, TRAIN = 12, 12, 28  # problems of each kind
WARM_STEPS, BATCH, LEARNING_RATE = 30, 16, 5e-5


def problems(drawn: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Rows of the supervised steps, held out, and to train on; no pair of numbers is in two."""
    parts: dict[str, list[dict[str, Any]]] = {"warm": [], "held-out": [], "train": []}
    for kind, (text, answer, first, second) in KINDS.items():
        pairs = list(product(*(range(low, high + 1) for low, high in (first, second))))
        places = ["warm"] * WARM + ["held-out"] * HELD_OUT + ["train"] * TRAIN
        for place, (a, b) in zip(places, drawn.sample(pairs, len(places)), strict=True):
            name, thing = drawn.choice(NAMES), drawn.choice(THINGS)
            asked = text.format(name, a, *((b, thing) if kind == "each" else (thing, b)))
            prompt = [{"role": "system", "content": ""}, {"role": "user", "content": asked}]
            row = {"prompt": prompt, "gold": str(answer(a, b)), "stratum": kind}
            parts[place].append(row | {"id": f"{kind} {a} {b}"})
    for rows in parts.values():
        drawn.shuffle(rows)
    return parts


def warm_start(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], steps: int = WARM_STEPS
) -> None:
    """Supervised steps on the answers; the prompts are no targets."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(1, steps + 1):
        batch = [rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)]
        examples = []
        for row in batch:
            prompt = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, tokenize=False
            )
            ask = tokenizer(prompt, add_special_tokens=False).input_ids
            say = tokenizer(row["gold"], add_special_tokens=False).input_ids
            examples.append((ask, [*say, tokenizer.eos_token_id]))
        width = max(len(ask) + len(say) for ask, say in examples)
        ids = torch.full((BATCH, width), tokenizer.pad_token_id)
        labels = torch.full((BATCH, width), -100)
        for i, (ask, say) in enumerate(examples):
            ids[i, : len(ask) + len(say)] = torch.tensor(ask + say)
            labels[i, len(ask) : len(ask) + len(say)] = torch.tensor(say)
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        said = labels[:, 1:] != -100
        loss = -out.log_probs[:, : width - 1][said].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"warm start: step {step} of {steps}, loss {loss.item():.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("folder", type=Path, help="is written")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    parts = problems(random.Random(0))
    for place in ("train", "held-out"):
        text = "".join(json.dumps(row) + "\n" for row in parts[place])
        (given.folder / f"{place}.jsonl").write_text(text, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    handle = add_fused_lm_head(model)
    warm_start(model, tokenizer, parts["warm"])
    handle.remove()
    model.save_pretrained(given.folder / "start")
    tokenizer.save_pretrained(given.folder / "start")


if __name__ == "__main__":
    main()
