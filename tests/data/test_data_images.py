"""Image rows reach a processor, every picture in its place; without one they are refused."""

import base64
import io
import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from riskpo.data.images import messages_with_images, processor_inputs, require_processor
from riskpo.data.questions import load_questions
from riskpo.rewards.scorer import Scorer
from riskpo.types import Question
from tests.toy import scored


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(buffer, format="PNG")
    return buffer.getvalue()


RED, BLUE = png("red"), png("blue")


def verl(*pictures, text="<image>Find x.", gold="3"):
    return {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": text}],
        "images": [{"bytes": p, "path": None} for p in pictures],
        "reward_model": {"style": "rule", "ground_truth": gold},
        "extra_info": {"index": 0},
    }


def load_parquet(tmp_path, *rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), tmp_path / "a.parquet")
    return load_questions(str(tmp_path / "a.parquet"))


class FakeProcessor:
    """Keeps what a processor of transformers would be called with."""

    image_processor = object()

    def apply_chat_template(self, conversations, **options):
        assert options["tokenize"] and options["return_dict"] and options["add_generation_prompt"]
        assert options["processor_kwargs"]["padding_side"] == "left"
        return [
            [
                part["text"] if part["type"] == "text" else part["image"].getpixel((0, 0))
                for message in conversation
                for part in message["content"]
            ]
            for conversation in conversations
        ]


def test_pictures_reach_the_processor_in_their_places(tmp_path):
    rows = [verl(RED), verl(RED, BLUE, text="is <image> like <image>?"), verl(BLUE, text="none")]
    questions = load_parquet(tmp_path, *rows)
    red, blue = (255, 0, 0), (0, 0, 255)
    assert processor_inputs(FakeProcessor(), questions) == [
        [red, "Find x."], ["is ", red, " like ", blue, "?"], [blue, "none"]
    ]  # fmt: skip


def test_the_picture_is_part_of_the_question(tmp_path):
    questions = load_parquet(tmp_path, verl(RED), verl(BLUE, gold="4"), verl(RED))
    assert [(q.gold, q.meta["copies"]) for q in questions] == [("3", 2), ("4", 1)]
    assert len({q.id for q in questions}) == 2
    assert "images" not in questions[0].meta
    with Scorer("tests.verifiers:half_for_short", workers=1) as scorer:  # no bytes cross as JSON
        assert scored(scorer, ["3"], questions[:1])[0] == [0.5]


@pytest.mark.parametrize("form", ["path", "base64", "data"])
def test_the_ways_to_store_a_picture(tmp_path, form):
    (tmp_path / "11.png").write_bytes(RED)
    text = base64.b64encode(RED).decode()
    value = {"path": "11.png", "base64": text, "data": f"data:image/png;base64,{text}"}[form]
    row = {
        "problem_text": "Find x.",
        "choices": ["1", "2"],
        "answer": "B",
        "image": value,
        "id": 11,
    }
    (tmp_path / "set.jsonl").write_text(json.dumps(row))
    (question,) = load_questions(str(tmp_path / "set.jsonl"))
    assert (question.prompt, question.gold) == ("Find x.\n(A) 1\n(B) 2", "B")
    (message,) = messages_with_images(question)
    assert message["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)


def test_a_model_without_eyes_is_refused_with_the_row_and_the_way_out(tmp_path):
    (question,) = load_parquet(tmp_path, verl(RED))
    tokenizer = SimpleNamespace()
    with pytest.raises(ValueError, match="hiyouga/geometry3k/0.*column 'images'.*vision-language"):
        require_processor([question], tokenizer)
    with pytest.raises(ValueError, match="vision-language"):
        processor_inputs(tokenizer, [question])
    require_processor([], tokenizer)
    require_processor([question], FakeProcessor())


def test_broken_pictures_are_named(tmp_path):
    (tmp_path / "set.jsonl").write_text(
        json.dumps({"problem": "a", "answer": "1"})
        + "\n"
        + json.dumps({"problem": "q", "answer": "1", "image": "absent.png"})
    )
    with pytest.raises(ValueError, match="line 2, column 'image'.*absent.png"):
        load_questions(str(tmp_path / "set.jsonl"))
    (question,) = load_parquet(tmp_path, verl(b"not a picture"))
    with pytest.raises(ValueError, match="cannot be opened"):
        messages_with_images(question)
    made = Question("q", "<image> and <image>", "1", images=(RED,))
    with pytest.raises(ValueError, match="2 places <image> for 1 pictures"):
        messages_with_images(made)


def load_jsonl(tmp_path, row):
    (tmp_path / "set.jsonl").write_text(json.dumps(row))
    return load_questions(str(tmp_path / "set.jsonl"))[0]


def shown(question):
    return processor_inputs(FakeProcessor(), [question])[0]


@pytest.mark.parametrize("place", ["<image_{}>", "<image {}>", "<image{}>"])
def test_numbered_places_take_the_pictures_they_name(tmp_path, place):
    row = {
        "question": f"is {place.format(2)} like {place.format(1)}?",
        "answer": "A",
        "options": f"['yes', 'no, like {place.format(2)}']",
        "image_1": text(RED),
        "image_2": text(BLUE),
        "image_3": text(RED),  # of the solution
        "image_4": None,
    }
    question = load_jsonl(tmp_path, row)
    red, blue = (255, 0, 0), (0, 0, 255)
    assert shown(question) == [
        "is ", blue, " like ", red, "?\n(A) yes\n(B) no, like ", blue
    ]  # fmt: skip
    assert question.images == (BLUE, RED, BLUE) and question.meta == {"copies": 1}


def test_a_numbered_place_of_one_picture(tmp_path):
    """MathVision: the picture under its own name, and a path that is not beside the file."""
    row = {"question": "<image1>x?", "answer": "3", "options": [], "image": "images/1.jpg"}
    question = load_jsonl(tmp_path, {**row, "decoded_image": text(RED)})
    assert shown(question) == [(255, 0, 0), "x?"]


def text(picture):
    return base64.b64encode(picture).decode()


PLAIN = {"problem": "<image>Find x.", "answer": "1"}
NUMBERED = {"question": "see <image_1> and <image_2>", "final_answer": ["1"]}


@pytest.mark.parametrize(
    "row, came",
    [
        (PLAIN, "<image> .*but 0 pictures"),
        ({**verl(), "images": None}, "<image> .*but 0 pictures"),
        ({**verl(), "images": []}, "<image> .*but 0 pictures"),
        ({**PLAIN, "problem": "<image>, <image>", "image": text(RED)}, "<image> <image> .*but 1 p"),
        ({**PLAIN, "images": [text(RED), text(BLUE)]}, "<image> .*but 2 pictures"),
        (NUMBERED, "<image_1> <image_2> .*but 0 pictures"),
        ({**NUMBERED, "image_2": text(RED)}, "<image_1> <image_2> .*but 1 .*number 2"),
        ({**NUMBERED, "question": "<image_0>", "image_1": text(RED)}, "<image_0> .*number 1"),
        ({**NUMBERED, "question": "<image>, <image_1>", "image_1": text(RED)}, "<image> <image_1>"),
        ({**NUMBERED, "question": "x?", "context": "<image_1>"}, "<image_1> .*but 0 pictures"),
    ],
)
def test_a_place_without_its_picture_is_refused(tmp_path, row, came):
    with pytest.raises(ValueError, match=f"set.jsonl line 1 has the places {came}") as caught:
        load_jsonl(tmp_path, row)
    assert "expected one for each place" in str(caught.value) and "drop" in str(caught.value)


def test_a_programming_task_may_mention_the_tag(tmp_path):
    row = {"text": "Count the <image> tags.", "test_list": ["assert f('<image>') == 1"]}
    assert "Count the <image> tags." in load_jsonl(tmp_path, row).prompt


def test_messages_of_parts(tmp_path):
    content = [{"type": "image"}, {"type": "text", "text": "Find x."}]
    row = {**verl(), "prompt": [{"role": "user", "content": content}], "images": [text(RED)]}
    assert shown(load_jsonl(tmp_path, row)) == [(255, 0, 0), "Find x."]
    row["prompt"][0]["content"] = [{"type": "video"}]
    with pytest.raises(ValueError, match=r"parts \['video'\].*line 1"):
        load_jsonl(tmp_path, row)
