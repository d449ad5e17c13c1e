"""The embedded tasks of `riskpo train`: a small Qwen2, twelve characters, additions to verify.

The answer is written least significant digit first, so that a small causal model can carry as it
goes. Difficulty is mixed on purpose: after the warm start sums of one-digit numbers are mostly
right and those of three digits rarely, which gives a risk-averse objective a lower tail to lift.
Nothing is downloaded; weights are random and the tokenizer is built in memory.

TASKS holds what can be asked for:

    embedded         the demo
    embedded:mixed   harder: the warm start rarely shows the longest sums, so about a quarter of the
                     questions is almost never right
    embedded:large   as mixed, with six digits and 21 million weights, for a GPU
    embedded:tiny    to try commands: learned in seconds, says nothing about algorithms
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count as count_up

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from riskpo.types import Question

SOURCE = "arithmetic"
CHARACTERS = "0123456789+="
PAD, EOS = "<pad>", "<eos>"
WARM_START_BATCH = 64
WARM_START_MAX_STEPS = 3000


@dataclass(frozen=True)
class Task:
    """One embedded task: its questions, its model, and its supervised warm start.

    sizes       largest numbers of digits of the two operands; questions take the pairs in turn
    warm_share  share of each pair in the warm start; None: as among the questions
    """

    digits: int
    sizes: tuple[tuple[int, int], ...]
    questions: int
    warm_target: float  # sampled accuracy; above it there is signal, far below 1 there is room
    warm_share: dict[str, float] | None = None
    model: tuple[int, int, int] = (128, 2, 4)  # hidden width, layers, heads
    warm_learning_rate: float = 1e-3


def all_sizes(digits: int) -> tuple[tuple[int, int], ...]:
    """Every pair of 1 to `digits` digits."""
    return tuple((a, b) for a in range(1, digits + 1) for b in range(1, digits + 1))


TASKS = {
    "embedded": Task(3, all_sizes(3), 6000, 0.4),
    "embedded:mixed": Task(
        4,
        ((1, 2), (2, 2), (3, 3), (4, 4)),
        8000,
        0.35,
        {"1+2": 0.40, "2+2": 0.35, "3+3": 0.20, "4+4": 0.05},
    ),
    "embedded:large": Task(
        6,
        ((2, 2), (3, 3), (4, 4), (5, 5), (6, 6)),
        40000,
        0.35,
        {"2+2": 0.32, "3+3": 0.28, "4+4": 0.22, "5+5": 0.13, "6+6": 0.05},
        model=(512, 8, 8),
        warm_learning_rate=3e-4,
    ),
    "embedded:tiny": Task(
        2, ((1, 1), (1, 2)), 200, 0.05, model=(32, 1, 2), warm_learning_rate=5e-3
    ),
}


def find_task(name: str | None) -> Task:
    """The task of that name; None: the demo's. ValueError lists the names."""
    if (name or "embedded") not in TASKS:
        raise ValueError(
            f"data: got {name!r}; expected one of {', '.join(TASKS)}, a file or a hub name. Check "
            "the spelling."
        )
    return TASKS[name or "embedded"]


def task_questions(task: Task, seed: int) -> list[Question]:
    """All questions of the task, training and held out."""
    return build_questions(task.questions, seed, task.digits, task.sizes)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, plus padding and end of sequence."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, padding_side="left"
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, size: tuple[int, int, int] = Task.model
) -> Qwen2ForCausalLM:
    """Random weights, the demo's third of a million by default; one seed gives the same bits."""
    hidden, layers, heads = size
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def build_questions(
    count: int, seed: int, digits: int = 3, sizes: Sequence[tuple[int, int]] | None = None
) -> list[Question]:
    """`count` different additions of two numbers of 1 to `digits` digits each, in random order.

    It draws until it has them: count should be at most a quarter of the sums that there are.

    The pairs of sizes, all of them by default, take turns (the smallest sums run out first).
    Operands are padded with zeros to one width, so the same place is the same position whatever
    the difficulty: small sums teach the model their part of the large ones.
    """
    rng = random.Random(seed)
    sizes = sizes or all_sizes(digits)
    chosen: dict[str, Question] = {}
    for turn in count_up():
        size_a, size_b = sizes[turn % len(sizes)]
        a, b = rng.randrange(10**size_a), rng.randrange(10**size_b)
        prompt = f"{a:0{digits}d}+{b:0{digits}d}="
        gold = f"{a + b:0{digits + 1}d}"[::-1]
        hardness = {"digits": size_a + size_b, "stratum": f"{size_a}+{size_b}"}
        chosen.setdefault(prompt, Question(prompt, prompt, gold, SOURCE, hardness))
        if len(chosen) == count:
            break
    questions = list(chosen.values())
    rng.shuffle(questions)
    return questions


def warm_start(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    task: Task,
    accuracy: Callable[[], float],
    *,
    seed: int,
    check_every: int = 10,
) -> tuple[int, float]:
    """Supervised steps until `accuracy()`, sampled, is task.warm_target; (steps, accuracy).

    Runs on the model's device. Without a warm start every reward is zero, and so is every policy
    gradient.
    """
    device = next(model.parameters()).device
    rng, share, weights = random.Random(seed), task.warm_share, None
    if share is not None:  # each stratum has its share, however many questions it holds
        size = Counter(q.meta["stratum"] for q in questions)
        weights = [share[q.meta["stratum"]] / size[q.meta["stratum"]] for q in questions]
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.warm_learning_rate)
    reached = 0.0
    for step in range(1, WARM_START_MAX_STEPS + 1):
        chosen = rng.choices(questions, weights, k=WARM_START_BATCH)
        tokens, labels = (x.to(device) for x in _supervised_batch(tokenizer, chosen))
        model.train()
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % check_every == 0:
            reached = accuracy()
            if reached >= task.warm_target:
                break
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return step, reached


def _supervised_batch(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded tokens and labels [batch, length]; only the answer and its end are learned."""
    tokens, labels = [], []
    for q in questions:
        prompt = tokenizer(str(q.prompt))["input_ids"]
        answer = tokenizer(q.gold)["input_ids"] + [tokenizer.eos_token_id]
        tokens.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = tokenizer.pad_token_id
    return pad_sequence(tokens, True, pad), pad_sequence(labels, True, -100)
