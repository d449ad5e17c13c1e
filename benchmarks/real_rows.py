"""Rows of a pretrained model: hidden states of its own answers, and its head.

A regime "NAME at T" of benchmarks/regimes.py means them, sampled at and divided by temperature T.
NAME is the folder of --model, or a model that `riskpo fetch-model` has made on this machine.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import AutoConfig

from riskpo.model.gguf import PACKAGED, models_in
from riskpo.model.load import Policy, load_policy
from riskpo.rollout.generate import GenerateSampler
from riskpo.rollout.sampler import SamplingLimits
from riskpo.types import Question

ASKED = [f"What is {a} + {b}? Explain." for a in range(3, 11) for b in (5, 17)]
EACH = 2  # answers to a question


REGIMES: dict[str, tuple[Path, float]] = {}  # name: folder and temperature; register fills it


def register(folder: str | None) -> list[tuple[str, int, int]]:
    """The regimes that can be had here, each with width and vocabulary of its head."""
    made = [Path(folder)] if folder else [models_in(None) / name for name in PACKAGED]
    found = []
    for path in filter(Path.is_dir, made):
        config = AutoConfig.from_pretrained(path).get_text_config()
        for temperature in (0.6, 1.0):
            name = f"{path.name} at {temperature:g}"
            REGIMES[name] = path, temperature
            found.append((name, config.hidden_size, config.vocab_size))
    return found


@functools.cache
def load(path: Path, temperature: float, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [rows, D] of its answers at this temperature, and its head [V, D]; float32."""
    policy = load_policy(str(path))
    hidden, _ = answers(policy, rows, temperature)
    return hidden, policy.model.get_output_embeddings().weight.detach().clone()


def answers(policy: Policy, rows: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [rows, D] and ids [rows] of the first tokens of every answer it samples."""
    each = -(-rows // (EACH * len(ASKED)))
    sampler = GenerateSampler(policy, SamplingLimits(64, each + each // 2, temperature))
    drawn = sampler.sample([Question(x, x, "") for x in ASKED], EACH, (0, 1))
    hidden, target = [], []
    for tokens, start in zip(drawn.tokens, drawn.prompt_len, strict=True):
        with torch.no_grad():
            states = policy.model.base_model(tokens[None]).last_hidden_state[0, start - 1 : -1]
        hidden.append(states[:each])
        target.append(tokens[start:][:each])
    return torch.cat(hidden), torch.cat(target)
