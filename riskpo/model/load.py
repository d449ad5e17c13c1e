"""Load a causal language model and its tokenizer, ready to be sampled and trained."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
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
)
from transformers.utils import is_flash_attn_2_available

from riskpo.data.hub import HUB_SECONDS, hub_error
from riskpo.data.images import require_processor
from riskpo.distributed import best_device
from riskpo.model.gguf import as_folder
from riskpo.model.vision import load_processor, placeholder_tokens
from riskpo.types import Question


@dataclass
class Policy:
    """The model that is trained and sampled, with its tokenizer.

    processor is set for a vision-language model whose data have pictures; it then reads all
    prompts.
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
    """load_policy(name), with the model's processor if a question has pictures.

    ValueError if there are pictures and the model has no image processor.
    """
    processor = None
    if any(q.images for q in questions):
        processor = load_processor(name, local=_is_local(name))
        require_processor(questions, processor)
    return load_policy(name, dtype=dtype, device=device, processor=processor)


def load_policy(
    name: str, *, dtype: str = "float32", device: str | None = None, processor: Any = None
) -> Policy:
    """A causal LM and its tokenizer from a folder, a GGUF file, the hub's cache or the hub.

    dtype      "float32" or "bfloat16"
    device     where the weights go; None: best_device(). Attention is chosen for best_device()
    processor  loads the vision-language model that it belongs to

    ValueError if there is no such model; ConnectionError, within seconds, if the hub is needed and
    does not answer.
    """
    name = as_folder(name)
    local = _is_local(name)
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    text = processor is None
    family = AutoModelForCausalLM if text else AutoModelForImageTextToText
    flash = text and best_device() == "cuda" and dtype == "bfloat16" and is_flash_attn_2_available()
    given = {"dtype": getattr(torch, dtype), "local_files_only": local}
    try:
        read = AutoTokenizer.from_pretrained
        tokenizer = read(name, local_files_only=local) if text else processor.tokenizer
        attention = "flash_attention_2" if flash else "sdpa"
        model = family.from_pretrained(name, attn_implementation=attention, **given)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model: cannot load {name!r} ({reason}). Give a folder that save_pretrained wrote, or "
            "the name of a causal language model."
        ) from None
    torch.nn.Module.to(model, device=device or best_device())
    return prepare(Policy(model, tokenizer, processor))


def prepare(policy: Policy) -> Policy:
    """Set left padding, a pad token, and a generation_config with end and pad tokens alone.

    The model's own top_p, top_k, penalties, suppressed and forced tokens would make the sampler
    another policy. ValueError if no end token is known.
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
    """Whether local files are enough; if not, ConnectionError unless the hub has the model."""
    if Path(name).is_dir() or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return True
    with contextlib.suppress(OSError, ValueError):
        AutoTokenizer.from_pretrained(name, local_files_only=True)
        return True
    if error := hub_error(lambda: model_info(name, timeout=HUB_SECONDS)):
        raise ConnectionError(
            f"model: {name!r} is no folder, is not in the cache, and the hub gave no model of that "
            f"name ({error}). Give a local folder."
        )
    return False


def end_tokens(policy: Policy) -> list[int]:
    """Ids that end a response: those of generation_config, config and tokenizer; placeholders."""
    return _end_ids(policy) + (placeholder_tokens(policy.model.config) if policy.processor else [])


def _end_ids(policy: Policy) -> list[int]:
    model, found = policy.model, list[Any]()
    text = model.config.get_text_config()
    for source in (model.generation_config, model.config, text, policy.tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found += ids if isinstance(ids, (list, tuple)) else [ids]
    return list(dict.fromkeys(i for i in found if i is not None and i >= 0))
