"""Load a causal language model and sample from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import model_info
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import is_flash_attn_2_available

from riskpo.data.hub import HUB_SECONDS, hub_error
from riskpo.data.images import require_processor
from riskpo.distributed import best_device
from riskpo.model.gguf import as_folder
from riskpo.model.positions import check_positions
from riskpo.model.vision import (
    Inputs,
    for_model,
    load_processor,
    placeholder_tokens,
    question_inputs,
)
from riskpo.types import Question, Rollouts, Stream


@dataclass
class Policy:
    """The model that is trained and sampled, with its tokenizer.

    processor is that of a vision-language model whose data have pictures, else None; it then reads
    all prompts.
    """

    model: Any
    tokenizer: Any
    processor: Any = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_policy_for(
    questions: Sequence[Question], name: str, *, dtype: str, device: str | None = None
) -> Policy:
    """The model `name` as load_policy has it, with its processor if a question has pictures.

    ValueError when there are pictures and the model has no processor that reads them.
    """
    if not any(q.images for q in questions):
        return load_policy(name, dtype=dtype, device=device)
    processor = load_processor(name, local=_is_local(name))
    require_processor(questions, processor)
    return load_policy(name, dtype=dtype, device=device, processor=processor)


def load_policy(
    name: str, *, dtype: str = "float32", device: str | None = None, processor: Any = None
) -> Policy:
    """A causal LM and its tokenizer from a folder, a GGUF file or, by name, the hub or its cache.

    With a processor, the vision-language model that it belongs to. device is where the weights are
    put; attention is chosen for best_device(). A folder is known by its absolute path from here on.
    ValueError, in one line, when there is no such model; ConnectionError, within seconds, when the
    hub is needed and does not answer.
    """
    name = as_folder(name)
    local = _is_local(name)
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    flash = best_device() == "cuda" and dtype == "bfloat16" and is_flash_attn_2_available()
    flash = flash and processor is None
    family = AutoModelForCausalLM if processor is None else AutoModelForImageTextToText
    try:
        tokenizer = (
            AutoTokenizer.from_pretrained(name, local_files_only=local)
            if processor is None
            else processor.tokenizer
        )
        model = family.from_pretrained(
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
    torch.nn.Module.to(model, device=device or best_device())
    return prepare(Policy(model, tokenizer, processor))


def prepare(policy: Policy) -> Policy:
    """Left padding, a pad token, and a generation_config that bends nothing.

    Only end tokens survive of the model's own generation_config (see end_tokens): its top_p, top_k,
    penalties, suppressed and forced tokens would make the sampler another policy.
    """
    tokenizer, model, ends = policy.tokenizer, policy.model, _end_ids(policy)
    tokenizer.padding_side = "left"
    if not ends:
        raise ValueError(
            "model: got no end token in generation_config, config or tokenizer; expected an "
            "eos_token_id. Set it in generation_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = ends[0]
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.eval()
    return policy


def _is_local(name: str) -> bool:
    """Whether files on this machine will do; where not, ConnectionError unless the hub has it."""
    if Path(name).is_dir() or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return True
    try:
        AutoTokenizer.from_pretrained(name, local_files_only=True)
        return True
    except (OSError, ValueError):
        pass
    if error := hub_error(lambda: model_info(name, timeout=HUB_SECONDS)):
        raise ConnectionError(
            f"model: {name!r} is no folder, is not in the cache, and the hub gave no model of that "
            f"name ({error}). Give a local folder."
        )
    return False


class _Draw(LogitsProcessor):
    """Draws every token from the softmax at the sampling temperature and notes its log-prob.

    Row i's t-th token is where its cumulative probability passes uniform[i, t] (inverse transform
    sampling): a function of that number and of the policy, whoever else is in the batch. generate
    is left with one possible token, which its argmax finds. Temperature 0 takes the likeliest token
    and notes its log-prob at 1.
    """

    def __init__(self, temperature: float, uniform: torch.Tensor) -> None:
        self.temperature = temperature
        self.uniform = uniform  # [rows, max_response_tokens] float64, in [0, 1)
        self.columns: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprob = torch.log_softmax(scores.float() / (self.temperature or 1.0), dim=-1)
        # In float64: a running sum in float32 need not grow, and would favour rare tokens.
        below = logprob.double().exp().cumsum(-1)
        total = below[:, -1:]
        place = self.uniform[:, len(self.columns), None] * total
        place = torch.minimum(place, torch.nextafter(total, torch.zeros_like(total)))
        chosen = torch.searchsorted(below, place, right=True)
        if self.temperature == 0:
            chosen = logprob.argmax(-1, keepdim=True)
        self.columns.append(logprob.gather(1, chosen)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


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


def stream_seed(*parts: int | str) -> int:
    """A seed in [0, 2^62) that is a function of `parts` alone, on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def response_noise(stream: Stream, question: Question, responses: int, length: int) -> torch.Tensor:
    """[responses, length] float64 in [0, 1): the random numbers of one question's responses."""
    g = torch.Generator().manual_seed(stream_seed(*stream, question.id))
    return torch.rand(responses, length, generator=g, dtype=torch.float64)


@torch.no_grad()
def sample(
    policy: Policy,
    questions: Sequence[Question],
    *,
    responses_per_question: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    stream: Stream,
    temperature: float = 1.0,
    batch_sequences: int = 512,
    static_cache: bool = False,
) -> Rollouts:
    """`responses_per_question` responses to every question, question-major; see Rollouts.

    Plain sampling from the whole distribution, so that the reported log-probs are those of the
    policy that is trained: no top_p, top_k or penalties, whatever the model's own
    generation_config asks for. A question's random numbers are a function of `stream` (say seed,
    step, attempt) and its id, not of the batch it is sampled in: cutting the batch otherwise, or
    over several processes, changes logits by rounding and so, very rarely, a token.

    static_cache: key-value cache of fixed size; on CUDA transformers then compiles the decoding.
    """
    done = Rollouts()
    prompts, done.inputs = read_prompts(policy, questions)
    check_lengths(questions, prompts, max_prompt_tokens)
    check_positions(policy.model, max(map(len, prompts), default=0), max_response_tokens)
    each = responses_per_question
    rows = [(q, p) for q, p in zip(questions, prompts, strict=True) for _ in range(each)]
    noise = [response_noise(stream, q, each, max_response_tokens) for q in questions]
    uniform = torch.cat([torch.zeros(0, max_response_tokens, dtype=torch.float64), *noise])
    policy.model.eval()
    # With pictures a batch has one question: prompts of one length, pictures of one shape.
    for part in _batches(len(rows), batch_sequences, each if policy.processor else len(rows)):
        draw = _Draw(temperature, uniform[part].to(policy.device))
        _sample_batch(policy, rows[part], draw, static_cache, done)
    return done


def _batches(rows: int, size: int, group: int) -> Iterator[slice]:
    """Runs of at most `size` rows, none of them across a multiple of `group`."""
    for first in range(0, rows, max(group, 1)):
        last = min(first + group, rows)
        for start in range(first, last, size):
            yield slice(start, min(start + size, last))


def read_prompts(
    policy: Policy, questions: Sequence[Question]
) -> tuple[list[list[int]], dict[str, Inputs]]:
    """Token ids of every prompt and, with a processor, what goes with them by question id."""
    if policy.processor is None:
        return [prompt_tokens(policy.tokenizer, q.prompt) for q in questions], {}
    read = [question_inputs(policy.processor, q) for q in questions]
    return [p for p, _ in read], {q.id: x for q, (_, x) in zip(questions, read, strict=True)}


def question_prompts(
    tokenizer: Any, questions: Sequence[Question], max_prompt_tokens: int
) -> list[list[int]]:
    """Token ids of every prompt; ValueError names one that is empty or too long."""
    prompts = [prompt_tokens(tokenizer, q.prompt) for q in questions]
    check_lengths(questions, prompts, max_prompt_tokens)
    return prompts


def check_lengths(
    questions: Sequence[Question], prompts: Sequence[list[int]], max_prompt_tokens: int
) -> None:
    """ValueError names a question whose prompt is empty or too long."""
    for question, ids in zip(questions, prompts, strict=True):
        if not 0 < len(ids) <= max_prompt_tokens:
            raise ValueError(
                f"sample: question {question.id!r} has {len(ids)} prompt tokens; expected 1 to "
                f"max_prompt_tokens={max_prompt_tokens}. Raise it or drop the question."
            )


def _sample_batch(
    policy: Policy,
    rows: Sequence[tuple[Question, list[int]]],
    draw: _Draw,
    static_cache: bool,
    done: Rollouts,
) -> None:
    """Left-padded prompts through generate; appends to `done`."""
    width = max(len(prompt) for _, prompt in rows)
    pad = policy.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for _, p in rows], device=policy.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for _, p in rows])
    ends, beside = end_tokens(policy), done.inputs.get(rows[0][0].id, {})
    output = policy.model.generate(
        input_ids=ids,
        attention_mask=mask.to(policy.device),
        logits_processor=LogitsProcessorList([draw]),
        max_new_tokens=draw.uniform.shape[1],
        do_sample=False,
        eos_token_id=ends,
        cache_implementation="static" if static_cache else None,
        synced_gpus=False,  # the processes of a run never wait for each other in here
        **for_model(beside, policy.model, count=len(rows)),
    )
    response, logprob = output[:, width:].cpu(), torch.stack(draw.columns, dim=1).cpu()
    for i, (question, prompt) in enumerate(rows):
        append_response(done, policy.tokenizer, question, prompt, response[i], logprob[i], ends)


def append_response(
    done: Rollouts,
    tokenizer: Any,
    question: Question,
    prompt: list[int],
    response: torch.Tensor,
    logprob: torch.Tensor,
    ends: list[int],
) -> None:
    """One response, cut after its first end token; without one it counts as truncated."""
    hits = torch.isin(response, torch.tensor(ends)).nonzero()
    length = int(hits[0]) + 1 if len(hits) else len(response)
    tokens = response[:length]
    done.tokens.append(torch.cat([torch.tensor(prompt), tokens]))
    done.prompt_len.append(len(prompt))
    done.logprob.append(logprob[:length].clone())
    done.text.append(tokenizer.decode(tokens, skip_special_tokens=True))
    done.truncated.append(not len(hits))
    done.question_id.append(question.id)


def end_tokens(policy: Policy) -> list[int]:
    """Ids that end a response: those of generation_config, config and tokenizer; placeholders."""
    return _end_ids(policy) + (placeholder_tokens(policy.model.config) if policy.processor else [])


def _end_ids(policy: Policy) -> list[int]:
    config, found = policy.model.config, list[Any]()
    own = policy.model.generation_config
    for source in (own, config, config.get_text_config(), policy.tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found += ids if isinstance(ids, (list, tuple)) else [ids]
    return list(dict.fromkeys(i for i in found if i is not None and i >= 0))
