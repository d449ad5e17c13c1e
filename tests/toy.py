"""A tiny model, questions and rollouts for the trainer's tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from riskpo.demo import build_questions, build_tokenizer
from riskpo.model.load import Policy, prepare
from riskpo.rewards.verdict import Outcome, Verdict, tally
from riskpo.rollout.generate import GenerateSampler
from riskpo.rollout.sampler import SamplingLimits
from riskpo.types import Rollouts


def tiny_config(vocab_size: int, **changes) -> Qwen2Config:
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    return Qwen2Config(**settings | changes)


def tiny_policy(seed: int = 0, **changes) -> Policy:
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(tiny_config(len(tokenizer), **changes))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # sharp enough for log-probs to differ
    return prepare(Policy(model, tokenizer))


def sample(
    policy, questions, *, responses_per_question, max_prompt_tokens, max_response_tokens, stream,
    temperature=1.0, batch_sequences=512, static_cache=False,
) -> Rollouts:  # fmt: skip
    """A GenerateSampler's responses."""
    limits = SamplingLimits(max_prompt_tokens, max_response_tokens, temperature)
    sampler = GenerateSampler(policy, limits, batch_sequences, static_cache)
    return sampler.sample(questions, responses_per_question, stream)


def verdicts_of(rewards) -> list[Verdict]:
    """A verdict for each reward, right above 0."""
    return [Verdict(r, Outcome.RIGHT if r > 0 else Outcome.WRONG) for r in rewards]


def scored(scorer, texts, questions) -> tuple[list[float], dict[str, int]]:
    """Rewards of R responses, question by question, and the counts of their outcomes."""
    verdicts = scorer.verdicts(texts, questions)
    return [v.reward for v in verdicts], tally(verdicts)


def random_rollouts(vocab: int, *, questions: int = 5, responses: int = 4, seed: int = 0):
    """Rollouts of random tokens and lengths; the sampler's log-probs are made up."""
    g = torch.Generator().manual_seed(seed)
    rollouts = Rollouts()
    for q in range(questions):
        prompt = torch.randint(2, vocab, (int(torch.randint(1, 7, (), generator=g)),), generator=g)
        for _ in range(responses):
            size = int(torch.randint(1, 9, (), generator=g))
            rollouts.tokens.append(
                torch.cat([prompt, torch.randint(2, vocab, (size,), generator=g)])
            )
            rollouts.prompt_len.append(len(prompt))
            rollouts.logprob.append(-torch.rand(size, generator=g))
            rollouts.text.append("")
            rollouts.truncated.append(False)
            rollouts.question_id.append(f"q{q}")
    return rollouts


def save_byte_model(folder: Path, **changes) -> Path:
    """A tiny model with a byte-level tokenizer, as from_pretrained wants it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(tiny_config(len(tokenizer), **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_arithmetic(folder: Path, count: int = 60) -> tuple[Path, Path]:
    """(model folder, jsonl file) of the embedded task, with an untrained tiny model."""
    policy = tiny_policy()
    policy.model.save_pretrained(folder / "model")
    policy.tokenizer.save_pretrained(folder / "model")
    rows = [
        {"prompt": q.prompt, "gold": q.gold, "id": q.id, "data_source": "arithmetic"}
        for q in build_questions(count, 0)
    ]
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "model", path
