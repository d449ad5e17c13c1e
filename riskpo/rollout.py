"""Load a causal language model and sample from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import model_info
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import is_flash_attn_2_available

from riskpo.records import Question, Rollouts

HUB_SECONDS = 3.0


@dataclass
class Policy:
    """The model that is trained and sampled, with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def best_device() -> str:
    """CUDA where there is one; hide it with CUDA_VISIBLE_DEVICES="" to work on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_policy(name: str, *, dtype: str = "float32", device: str | None = None) -> Policy:
    """A causal LM and its tokenizer from a folder or, by name, from the hub or its cache.

    ValueError, in one line, when there is no such model; ConnectionError, within seconds, when the
    hub is needed and does not answer.
    """
    local = _is_local(name)
    device = device or best_device()
    flash = device == "cuda" and dtype == "bfloat16" and is_flash_attn_2_available()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            local_files_only=local,
            dtype=getattr(torch, dtype),
            attn_implementation="flash_attention_2" if flash else "sdpa",
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model: cannot load {name!r} ({reason}). Give a folder that save_pretrained wrote, or "
            "the name of a causal language model."
        ) from None
    torch.nn.Module.to(model, device=device)
    return prepare(Policy(model, tokenizer))


def prepare(policy: Policy) -> Policy:
    """Left padding, a pad token, and a generation_config that bends nothing.

    Only the end-of-sequence ids of the model's own generation_config survive: its top_p, top_k and
    penalties would make the sampler another policy than the one that is trained.
    """
    tokenizer, model = policy.tokenizer, policy.model
    tokenizer.padding_side = "left"
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    if ends is None:
        raise ValueError(
            "model: got neither eos_token_id in generation_config nor an eos_token in the "
            "tokenizer; expected one. Set it in generation_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = ends[0] if isinstance(ends, (list, tuple)) else ends
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.eval()
    return policy


def _is_local(name: str) -> bool:
    """Whether files on this machine will do; asks the hub, with a short limit, when they will not.

    The libraries would retry for most of a minute before they say that there is no network.
    """
    if Path(name).is_dir() or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return True
    try:
        AutoTokenizer.from_pretrained(name, local_files_only=True)
        return True
    except (OSError, ValueError):
        pass
    try:
        model_info(name, timeout=HUB_SECONDS)
    except Exception as error:  # whatever the client library raises, the run cannot start
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(
            f"model: {name!r} is no folder, is not in the cache, and the hub gave no model of that "
            f"name ({type(error).__name__}: {reason[:200]}). Give a local folder."
        ) from None
    return False


class _LogprobRecorder(LogitsProcessor):
    """Notes the log-prob of every sampled token at the sampling temperature.

    A step's choice is only seen at the next call, so one [rows, V] table is kept, never all of
    them; `finish` collects the last step.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.columns: list[torch.Tensor] = []
        self.table: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.finish(input_ids[:, -1])
        self.table = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        return scores

    def finish(self, chosen: torch.Tensor) -> None:
        if self.table is not None:
            self.columns.append(self.table.gather(1, chosen[:, None])[:, 0])


def seed_everything(*parts: int) -> None:
    """Make torch's random numbers a function of `parts` (say seed, step, attempt)."""
    value = 0
    for part in parts:
        value = (value * 1_000_003 + part + 1) % (2**63)
    torch.manual_seed(value)


def prompt_tokens(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of one prompt; the chat template is used where the tokenizer has one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not isinstance(prompt, str):
        prompt = "\n\n".join(message["content"] for message in prompt) + "\n\n"
    return list(tokenizer(prompt)["input_ids"])


@torch.no_grad()
def sample(
    policy: Policy,
    questions: Sequence[Question],
    *,
    responses_per_question: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    temperature: float = 1.0,
    batch_sequences: int = 512,
) -> Rollouts:
    """`responses_per_question` responses to every question, question-major; see Rollouts.

    Plain sampling from the whole distribution, so that the reported log-probs are those of the
    policy that is trained: top_p 1, top_k 0, no penalties, whatever the model's own
    generation_config asks for.
    """
    done = Rollouts()
    rows = [q for q in questions for _ in range(responses_per_question)]
    prompts = {q.id: prompt_tokens(policy.tokenizer, q.prompt) for q in questions}
    for name, ids in prompts.items():
        if not 0 < len(ids) <= max_prompt_tokens:
            raise ValueError(
                f"sample: question {name!r} has {len(ids)} prompt tokens; expected 1 to "
                f"max_prompt_tokens={max_prompt_tokens}. Raise it or drop the question."
            )
    policy.model.eval()
    for start in range(0, len(rows), batch_sequences):
        part = rows[start : start + batch_sequences]
        _sample_batch(
            policy, part, [prompts[q.id] for q in part], max_response_tokens, temperature, done
        )
    return done


def _sample_batch(
    policy: Policy,
    rows: Sequence[Question],
    prompts: list[list[int]],
    max_response_tokens: int,
    temperature: float,
    done: Rollouts,
) -> None:
    """Left-padded prompts through generate; appends to `done`."""
    tokenizer, width = policy.tokenizer, max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=policy.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=policy.device
    )
    recorder = _LogprobRecorder(temperature)
    output = policy.model.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([recorder]),
        max_new_tokens=max_response_tokens,
        do_sample=True,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
    )
    recorder.finish(output[:, -1])
    response = output[:, width:].cpu()
    logprob = torch.stack(recorder.columns, dim=1).cpu()
    ends = torch.isin(response, torch.tensor(end_tokens(policy)))
    for i, question in enumerate(rows):
        hits = ends[i].nonzero()
        length = int(hits[0]) + 1 if len(hits) else response.shape[1]
        tokens = response[i, :length]
        done.tokens.append(torch.cat([torch.tensor(prompts[i]), tokens]))
        done.prompt_len.append(len(prompts[i]))
        done.logprob.append(logprob[i, :length].clone())
        done.text.append(tokenizer.decode(tokens, skip_special_tokens=True))
        done.truncated.append(not len(hits))
        done.question_id.append(question.id)


def end_tokens(policy: Policy) -> list[int]:
    """Ids that end a response: the model's own list, else the tokenizer's."""
    ids = policy.model.generation_config.eos_token_id
    if ids is None:
        ids = policy.tokenizer.eos_token_id
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]
