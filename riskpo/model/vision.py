"""Vision-language models: pictures on their way into sampling and into the update.

A processor turns a question into the prompt's token ids, with a placeholder for every patch of a
picture, and into what the model reads beside them (pixels, grids, token types). The model's own
forward replaces placeholders by features; its decoder alone would ignore the pictures in silence.
Sequences with pictures are therefore never packed.

P tokens of a prompt, T of a sequence's inputs, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoProcessor

from riskpo.config import TrainConfig
from riskpo.data.images import processor_inputs
from riskpo.types import Question
from riskpo_kernels.causal_lm import relative_gap

Inputs = dict[str, torch.Tensor]  # what the model reads beside a prompt's tokens

PER_TOKEN = ("mm_token_type_ids", "token_type_ids")  # [1, P]; 0 is text
PLACEHOLDERS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")


def load_processor(name: str, *, local: bool) -> Any:
    """The processor of a folder or of the hub's `name`; of a text model, its tokenizer.

    ValueError where it cannot be loaded (some need torchvision) or has no chat template.
    """
    try:
        processor = AutoProcessor.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model: cannot load the processor of {name!r}, which rows with pictures need "
            f"({reason}). Install what it asks for, or drop these rows."
        ) from None
    if getattr(processor, "image_processor", None) and not processor.chat_template:
        raise ValueError(
            f"model: the {type(processor).__name__} of {name!r} has no chat template, which says "
            "where a prompt's pictures go. Add chat_template.jinja to the folder."
        )
    return processor


def question_inputs(processor: Any, question: Question) -> tuple[list[int], Inputs]:
    """The prompt's P token ids, pictures as placeholders, and what goes with them; batch of one.

    ValueError for a picture that cannot be read, and for an input per token whose values over a
    response are not known.
    """
    batch = dict(processor_inputs(processor, [question]))
    ids = batch.pop("input_ids")
    batch.pop("attention_mask", None)
    for name, value in batch.items():
        if value.shape[:2] == ids.shape and name not in PER_TOKEN:
            raise ValueError(
                f"data: {type(processor).__name__} gives {name!r} for every token of a prompt; "
                f"expected only {', '.join(PER_TOKEN)}. This kind of model is not supported."
            )
    return ids[0].tolist(), batch


def for_model(inputs: Inputs, model: Any, *, count: int = 1) -> Inputs:
    """`inputs` for a batch of `count` equal prompts, on the model's device and in its dtype."""
    return {
        name: torch.cat(
            [x.to(model.device, model.dtype if x.is_floating_point() else None)] * count
        )
        for name, x in inputs.items()
    }


def vision_hidden_states(model: Any, input_ids: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Last hidden states [T, D] of one sequence, input_ids [1, T], that begins with its prompt.

    The pictures' features are in them, and gradients reach the vision tower.
    """
    inputs = for_model(inputs, model)
    for name in PER_TOKEN:
        if name in inputs:
            rest = input_ids.shape[1] - inputs[name].shape[1]
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, rest))
    output = model.base_model(input_ids=input_ids, use_cache=False, **inputs)
    return output.last_hidden_state[0]


def placeholder_tokens(config: Any) -> list[int]:
    """Ids that stand for pictures. A response ends with one, as with an end token.

    So it is never an input of the update, where the model would look for its features.
    """
    found = (getattr(config, name, None) for name in PLACEHOLDERS)
    return sorted({int(token) for token in found if token is not None})


def check_vision_setup(config: TrainConfig, processes: int) -> None:
    """ValueError for settings that do not support pictures."""
    reasons = {
        "sampler.engine='vllm'": config.sampler.engine == "vllm",
        f"{processes} processes": processes > 1,
        "lora.rank > 0": config.lora.rank > 0,
    }
    for what in (what for what, wrong in reasons.items() if wrong):
        raise ValueError(
            f"data: rows with pictures do not train with {what}; expected one process, "
            "sampler.engine='generate' and all weights. Change it or drop these rows."
        )


@torch.no_grad()
def check_vision_head(policy: Any, head: Any, questions: Iterable[Question]) -> None:
    """ValueError unless vision_hidden_states and the head give the model's own logits.

    Tried on the first question with pictures.
    """
    question = next(q for q in questions if q.images)
    ids, inputs = question_inputs(policy.processor, question)
    input_ids = torch.tensor([ids], device=policy.device)
    theirs = policy.model(input_ids=input_ids, use_cache=False, **for_model(inputs, policy.model))
    hidden = vision_hidden_states(policy.model, input_ids, inputs)
    gap = relative_gap(head, hidden, theirs.logits[0])
    if not gap < 2e-2:
        raise ValueError(
            f"head: with pictures, the logits of a {type(policy.model).__name__} differ from its "
            f"head on its hidden states by {gap:.3g} of their largest; expected rounding. This "
            "kind of model is not supported."
        )
