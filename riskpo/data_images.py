"""Pictures of image rows (Geometry3K and its like), up to a vision-language processor.

A row's pictures are in the column "images", "image" or "decoded_image": bytes, {"bytes", "path"},
a path beside the data file, base64 text, or a PIL picture. They stay encoded in Question.images and
are opened when a processor asks. Each "<image>" of the prompt stands for one picture; without one
the pictures come first.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from riskpo.records import Question

COLUMNS = ("images", "image", "decoded_image")
PLACE = "<image>"


def image_columns(row: dict[str, Any]) -> list[str]:
    """The columns of a row that hold pictures."""
    return [name for name in COLUMNS if row.get(name)]


def read_images(row: dict[str, Any], folder: Path, where: str) -> tuple[bytes | str, ...]:
    """The pictures of a row, encoded bytes or paths; `where` names the row in errors."""
    columns = image_columns(row)
    if not columns:
        return ()
    name = "decoded_image" if "decoded_image" in columns else columns[0]
    values = row[name] if isinstance(row[name], (list, tuple)) else [row[name]]
    return tuple(_encoded(value, folder, f"{where}, column {name!r}") for value in values)


def _encoded(value: Any, folder: Path, where: str) -> bytes | str:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if hasattr(value, "save"):  # PIL
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return buffer.getvalue()
    if isinstance(value, str):
        for path in (Path(value), folder / value):
            if len(value) < 4096 and path.is_file():
                return str(path)
        try:
            return base64.b64decode(value.partition("base64,")[2] or value, validate=True)
        except binascii.Error:
            pass
    raise ValueError(
        f"load_questions: {where} holds no picture: got {str(value)[:80]!r}; expected bytes, "
        f"base64 text, or a path that exists here or in {folder}. Mend the column or drop the row."
    )


def require_processor(questions: Iterable[Question], processor: Any) -> None:
    """The door: ValueError when a question has pictures and `processor` cannot read them.

    processor  what AutoProcessor gives for the model; a tokenizer alone has no image_processor
    """
    if getattr(processor, "image_processor", None) is not None:
        return
    shown = next((q for q in questions if q.images), None)
    if shown is not None:
        raise ValueError(
            f"data: question {shown.id!r} of {shown.source!r} has {len(shown.images)} pictures "
            f"(column 'images'), but a {type(processor).__name__} reads the prompts, which has no "
            "image processor. Read them with a vision-language model's, or drop these rows."
        )


def messages_with_images(question: Question) -> list[dict[str, Any]]:
    """Chat messages whose content is a list of parts, as processors read them.

    [{"role", "content": [{"type": "text", "text"} or {"type": "image", "image": PIL picture}]}].
    ValueError when the places and the pictures differ in number, or a picture cannot be opened.
    """
    prompt = question.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    places = sum(m["content"].count(PLACE) for m in messages)
    if places not in (0, len(question.images)):
        raise ValueError(
            f"data: question {question.id!r} of {question.source!r} has {places} places {PLACE} "
            f"for {len(question.images)} pictures; expected as many. Mend its prompt."
        )
    pictures = [_opened(image, question) for image in question.images]
    done = []
    for message in messages:
        first = [] if places or message["role"] != "user" else pictures
        pieces = message["content"].split(PLACE)
        parts: list[dict[str, Any]] = [{"type": "image", "image": p} for p in first]
        for i, piece in enumerate(pieces):
            if i:
                parts.append({"type": "image", "image": pictures.pop(0)})
            if piece.strip():
                parts.append({"type": "text", "text": piece})
        if first:
            pictures = []
        done.append({"role": message["role"], "content": parts})
    return done


def _opened(image: bytes | str, question: Question) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(
            f"data: a picture of question {question.id!r} of {question.source!r} cannot be opened: "
            f"{error}. Drop the row."
        ) from None


def processor_inputs(processor: Any, questions: Sequence[Question]) -> Any:
    """The processor's batch for questions with pictures: input_ids, attention_mask, pixel_values
    and whatever else the model wants, left-padded, as tensors."""
    require_processor(questions, processor)
    return processor.apply_chat_template(
        [messages_with_images(q) for q in questions],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
    )
