"""Sampling with transformers from a pretrained model: RISKPO_REAL_MODEL names its folder."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from riskpo.model.load import load_policy
from riskpo.rollout.generate import response_noise
from riskpo.rollout.sampler import prompt_tokens
from riskpo.types import Question
from tests.toy import sample

# Chats of different lengths, so that there is padding on the left.
QUESTIONS = [
    Question(str(i), p, "")
    for i, p in enumerate(
        (
            "What is 3 + 4? Answer with the number only.",
            "Say yes or no: is the sea wet?",
            "A box holds 12 pencils. Tom has 3 boxes and gives 5 pencils away. How many are left?",
            "Hi",
        )
    )
]
LIMITS = {"max_prompt_tokens": 100, "max_response_tokens": 24, "stream": (0, 1)}
LEAKS = {"do_sample": True, "temperature": 0.01, "top_p": 0.1, "top_k": 1, "min_new_tokens": 20}
LEAKS |= {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": [198]}


@pytest.fixture(scope="module")
def policy(real_model):
    return load_policy(str(real_model))


def draw(policy, questions=QUESTIONS, each=3, **changes):
    return sample(policy, questions, responses_per_question=each, **LIMITS | changes)


@pytest.fixture(scope="module")
def drawn(policy):
    return draw(policy)


def with_generation_config(real_model: Path, folder: Path, **changes) -> str:
    """The same model, its generation_config.json changed."""
    for path in real_model.iterdir():
        if path.name != "generation_config.json":
            (folder / path.name).symlink_to(path)
    own = json.loads((real_model / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(own | changes))
    return str(folder)


def close(ours, theirs, atol=2e-4):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def by_hand(policy, question, row, temperature):
    """One response and its log-probs: no batch, padding or cache, and in float64 after the logits.

    A token is the first one to which the probabilities add up beyond the uniform number.
    """
    asked, answer, logprobs = prompt_tokens(policy.tokenizer, question.prompt), [], []
    end = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for u in response_noise(LIMITS["stream"], question, 3, LIMITS["max_response_tokens"])[row]:
        with torch.no_grad():
            z = policy.model(input_ids=torch.tensor([asked + answer]), use_cache=False).logits
        logprob = (z[0, -1].double() / temperature).log_softmax(-1)
        answer.append(int((logprob.exp().cumsum(0) <= u).sum()))
        logprobs.append(float(logprob[answer[-1]]))
        if answer[-1] == end:
            break
    return asked + answer, torch.tensor(logprobs)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_responses_are_those_of_a_loop_over_forward_one_row_at_a_time(policy, temperature):
    drawn = draw(policy, temperature=temperature)
    assert len(set(drawn.prompt_len)) == len(QUESTIONS)  # there is padding
    for i in range(1, len(drawn), 3):
        tokens, logprob = by_hand(policy, QUESTIONS[i // 3], i % 3, temperature)
        assert drawn.tokens[i].tolist() == tokens
        close([drawn.logprob[i]], [logprob])
    assert torch.cat(drawn.logprob).std() > 0.4  # the softmax is not flat


def test_padding_and_batches_change_nothing(policy, drawn):
    alone = draw(policy, QUESTIONS[3:])
    assert alone.text == drawn.text[9:]
    close(alone.logprob, drawn.logprob[9:])
    for changes in ({"batch_sequences": 5}, {"static_cache": True}):
        other = draw(policy, **changes)
        assert other.text == drawn.text
        close(other.logprob, drawn.logprob)


def test_a_response_ends_at_the_first_end_token_which_is_the_pad_token_too(policy, drawn):
    end = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert policy.tokenizer.pad_token_id == end == policy.tokenizer.eos_token_id
    assert any(drawn.truncated) != all(drawn.truncated)
    for i, (tokens, start) in enumerate(zip(drawn.tokens, drawn.prompt_len, strict=True)):
        response = tokens[start:].tolist()
        assert response.count(end) == (0 if drawn.truncated[i] else 1)
        assert response[-1] == end or len(response) == LIMITS["max_response_tokens"]
        assert len(response) == len(drawn.logprob[i])
        assert drawn.text[i] == policy.tokenizer.decode(response, skip_special_tokens=True)


def test_nothing_of_generation_config_reaches_the_draw_but_its_end_tokens(
    real_model, tmp_path, drawn
):
    """Its end token, here the commonest one within responses, is one beside the tokenizer's."""
    within = zip(drawn.tokens, drawn.prompt_len, strict=True)
    counts = Counter(t for tokens, start in within for t in tokens[start + 1 : -1].tolist())
    end = counts.most_common(1)[0][0]
    bent = load_policy(with_generation_config(real_model, tmp_path, **LEAKS, eos_token_id=end))
    others = draw(bent)
    ended = 0
    for ours, theirs, start in zip(others.tokens, drawn.tokens, drawn.prompt_len, strict=True):
        response = theirs[start:].tolist()
        length = response.index(end) + 1 if end in response else len(response)
        assert ours[start:].tolist() == response[:length]
        ended += length < len(response)
    assert ended


def test_speed(policy, capsys):
    """Printed: tokens a CPU second by kind of cache, the share of computed tokens that is kept."""
    for static in (False, True):
        draw(policy, each=1, static_cache=static)
        began = time.process_time()
        rollouts = draw(policy, each=5, static_cache=static)
        seconds, lengths = time.process_time() - began, [len(x) for x in rollouts.logprob]
        kept = sum(lengths) / (len(lengths) * max(lengths))
        with capsys.disabled():
            print(
                f"\nstatic cache {static}: {sum(lengths) / seconds:.1f} tokens a CPU "
                f"second, {kept:.2f} kept"
            )
    assert len(rollouts) == 20
