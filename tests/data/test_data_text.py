"""A question is asked whole, and no prompt gets a second order how to mark its answer."""

import json

import pytest

from riskpo.data.prompts import listed_choices, names_answer_form
from riskpo.data.questions import BOXED_INSTRUCTION, load_questions

DAPO = (  # the official rows of DAPO-Math-17k and AIME-2024, around each problem
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    'How many?\n\nRemember to put your answer on its own line after "Answer:".'
)
VERL_GSM8K = 'How many? Let\'s think step by step and output the final answer after "####".'


def load(tmp_path, **row):
    (tmp_path / "set.jsonl").write_text(json.dumps(row))
    (question,) = load_questions(str(tmp_path / "set.jsonl"), instruction=BOXED_INSTRUCTION)
    return question


@pytest.mark.parametrize(
    "prompt",
    [
        DAPO,
        VERL_GSM8K,
        "q The last line should be:\n#### <number>",
        "How many? The last line is of the form Answer: <number>.",
        'Reply with a JSON object {"answer": your answer}. How many?',
        "Question: how many?\nAnswer:",
        "How many, in \\boxed{}?",
    ],
)
def test_a_prompt_with_an_answer_form_gets_no_other(tmp_path, prompt):
    gold = {"style": "rule", "ground_truth": "34"}
    asked = [{"role": "system", "content": prompt}, {"role": "user", "content": "and 1+1?"}]
    assert load(tmp_path, prompt=prompt, answer="1").prompt == prompt
    assert load(tmp_path, prompt=asked, reward_model=gold).prompt == asked


@pytest.mark.parametrize(
    "prompt",
    [
        "#### Task 3\nHow many?",
        "##### How many?",
        "Tom asks. Bob's answer: 5. Is he right?",
        "Put it between <answer> and </answer>.",  # which the math verifier does not look for
        "He answers $5$.",
    ],
)
def test_other_prompts_get_the_instruction(tmp_path, prompt):
    assert load(tmp_path, prompt=prompt, answer="1").prompt == f"{prompt}\n{BOXED_INSTRUCTION}"


def test_no_real_problem_names_a_form_by_accident(shared_data):
    for name in ("gsm8k_train", "math500", "amc23", "olympiadbench_oe_maths_en"):
        questions = load_questions(str(shared_data / "problems" / f"{name}.jsonl"))
        assert not [q.prompt for q in questions if names_answer_form(q.prompt)]


def test_the_context_is_asked_with_the_question(tmp_path):
    row = {"context": "Let $a=2$.", "question": "$a+1$?", "final_answer": ["$3$"], "unit": "m"}
    question = load(tmp_path, **row)
    assert question.prompt == f"Let $a=2$.\n$a+1$?\n{BOXED_INSTRUCTION}"
    assert question.meta == {"unit": "m", "copies": 1}
    for nothing in (None, "", " "):
        plain = load(tmp_path, **{**row, "context": nothing})
        assert plain.prompt == f"$a+1$?\n{BOXED_INSTRUCTION}"
    with pytest.raises(ValueError, match="context of type dict; expected text.*line 1"):
        load(tmp_path, **{**row, "context": {"title": "x"}})


def test_the_choices_are_asked_with_the_question(tmp_path):
    question = load(tmp_path, question="x?", options=["3", "4"], answer="B")
    assert question.prompt == f"x?\n(A) 3\n(B) 4\n{BOXED_INSTRUCTION}" and question.gold == "B"
    assert load(tmp_path, problem="x?", choices=["3", "4"], answer="4").prompt == question.prompt
    assert "(A)" not in load(tmp_path, question="x?", options=[], answer="5").prompt
    with pytest.raises(ValueError, match="gold '1' beside 2 choices; .*letters A to B.*line 1"):
        load(tmp_path, question="x?", choices=["red", "blue"], answer=1)  # an index
    with pytest.raises(ValueError, match="gold 'C' beside 2 choices"):
        load(tmp_path, question="x?", choices=["red", "blue"], answer="C")


def test_how_choices_are_written():
    lettered = ["A) 21", "B) 22"]
    assert listed_choices(lettered) == lettered
    assert listed_choices("['$6', \"it's\"]") == ["(A) $6", "(B) it's"]
    assert listed_choices('["a", "b"]') == ["(A) a", "(B) b"]
    assert listed_choices("[A] one [B] two") == ["[A] one [B] two"]
    assert listed_choices(None) == listed_choices([]) == listed_choices("[]") == []
    for bad in (["x"] * 11, {"A": "x"}, [{"text": "x"}]):
        with pytest.raises(ValueError, match="got the choices"):
            listed_choices(bad)
