"""tools/word_problems.py: what a model is trained on is not what it is asked."""

import random
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from riskpo_kernels import add_fused_lm_head
from tools.word_problems import KINDS, problems, warm_start


def test_no_numbers_are_in_two_parts_and_every_answer_is_right():
    parts = problems(random.Random(0))
    seen: dict[tuple[str, str, str], str] = {}
    for part, rows in parts.items():
        assert {row["stratum"] for row in rows} == set(KINDS)
        for row in rows:
            a, b = re.findall(r"\d+", row["prompt"][-1]["content"])
            assert seen.setdefault((row["stratum"], a, b), part) == part
            answer = {"loses": int(a) - int(b), "each": int(a) * int(b)}
            assert row["gold"] == str(answer.get(row["stratum"], int(a) + int(b)))
    assert len({row["id"] for rows in parts.values() for row in rows}) == len(seen)


def test_warm_start_teaches_the_form_of_an_answer(real_model, capsys):
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    handle = add_fused_lm_head(model)
    warm_start(model, tokenizer, problems(random.Random(0))["warm"], steps=6)
    handle.remove()
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0] / 3
