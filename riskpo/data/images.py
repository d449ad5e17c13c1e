"""Read the pictures of rows (Geometry3K and its like) and hand them to a processor.

A row's pictures are in the column "images", "image" or "decoded_image", or one by one in "image_1"
to "image_9": bytes, {"bytes", "path"}, a path beside the data file, base64 text, or a PIL picture.
They stay encoded in Question.images and are opened when a processor asks.

Each "<image>" in the prompt is the place of one picture; a prompt without one starts with its
pictures. Numbered places "<image_2>", "<image 2>" or "<image2>" (OlympiadBench, MMMU, MathVision)
say which picture and become "<image>"; pictures that they do not name belong to the solution and
are left out. A place without a picture is an error, except in programming tasks, whose texts may
mention the tag.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from riskpo.types import Prompt, Question, texts_of

Picture = bytes | str  # encoded, or a path

NUMBERED = {f"image_{n}": n for n in range(1, 10)}
COLUMNS = ("decoded_image", "images", "image")
PLACE = "<image>"
_PLACES = re.compile(r"<image(?:[ _]?(\d+))?>")


def image_columns(row: dict[str, Any]) -> list[str]:
    """The columns of a row that hold pictures."""
    return [name for name in (*NUMBERED, *COLUMNS) if row.get(name)]


def read_pictures(row: dict[str, Any], folder: Path, where: str) -> dict[int, Picture]:
    """The pictures of a row by number, from 1; `where` names the row in errors."""
    columns = image_columns(row)
    values = [(NUMBERED[name], name, row[name]) for name in columns if name in NUMBERED]
    if columns and not values:
        name, value = columns[0], row[columns[0]]
        listed = value if isinstance(value, (list, tuple)) else [value]
        values = [(i, name, one) for i, one in enumerate(listed, start=1)]
    return {i: _encoded(x, folder, f"{where}, column {name!r}") for i, name, x in values}


def place_pictures(
    prompt: Prompt, pictures: Mapping[int, Picture], where: str
) -> tuple[Prompt, tuple[Picture, ...]]:
    """(prompt, its pictures in the order of its places); every place is then "<image>".

    ValueError where a place has no picture, or pictures have no place and places no number.
    """
    places = [match for text in texts_of(prompt) for match in _PLACES.finditer(text)]
    numbers = [int(match[1]) for match in places if match[1]]
    named = len(numbers) == len(places) and {*numbers} <= {*pictures}
    if not (named if numbers else len(places) in (0, len(pictures))):
        which = f" (number {', '.join(map(str, pictures))})" if numbers and pictures else ""
        raise ValueError(
            f"load_questions: {where} has the places {' '.join(m[0] for m in places)} in its "
            f"prompt, but {len(pictures)} pictures were read{which}; expected one for each place, "
            f"from a column {', '.join(COLUMNS)} or image_1 to image_9. Add the pictures or drop "
            "the row; where the text only mentions the tag, spell it without the angle brackets."
        )
    images = tuple(pictures[n] for n in (numbers or pictures))
    if not numbers:
        return prompt, images
    if isinstance(prompt, str):
        return _PLACES.sub(PLACE, prompt), images
    return [{**m, "content": _PLACES.sub(PLACE, m["content"])} for m in prompt], images


def _encoded(value: Any, folder: Path, where: str) -> Picture:
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
        with contextlib.suppress(binascii.Error):
            return base64.b64decode(value.partition("base64,")[2] or value, validate=True)
    raise ValueError(
        f"load_questions: {where} holds no picture: got {str(value)[:80]!r}; expected bytes, "
        f"base64 text, or a path that exists here or in {folder}. Mend the column or drop the row."
    )


def require_processor(questions: Iterable[Question], processor: Any) -> None:
    """ValueError if a question has pictures and `processor` cannot read them.

    processor  what AutoProcessor gives for the model; a tokenizer alone has no image_processor
    """
    if getattr(processor, "image_processor", None) is not None:
        return
    shown = next((q for q in questions if q.images), None)
    if shown is not None:
        raise ValueError(
            f"data: question {shown.id!r} of {shown.source!r} has {len(shown.images)} pictures "
            f"(column 'images'), but the model's {type(processor).__name__} has no image "
            "processor. Choose a vision-language model, or drop these rows."
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
    pictures = iter([_opened(image, question) for image in question.images])
    done = []
    for message in messages:
        first = [] if places or message["role"] != "user" else pictures
        parts: list[dict[str, Any]] = [{"type": "image", "image": p} for p in first]
        for i, piece in enumerate(message["content"].split(PLACE)):
            if i:
                parts.append({"type": "image", "image": next(pictures)})
            if piece.strip():
                parts.append({"type": "text", "text": piece})
        done.append({"role": message["role"], "content": parts})
    return done


def _opened(image: Picture, question: Question) -> Any:
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
