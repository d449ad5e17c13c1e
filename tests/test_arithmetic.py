"""The tasks that can be asked for: their strata, their warm start, their names."""

from collections import Counter
from dataclasses import replace

import pytest

from riskpo.arithmetic import (
    TASKS,
    build_model,
    build_questions,
    build_tokenizer,
    find_task,
    task_questions,
    warm_start,
)
from riskpo.config import TrainConfig, resolve, validate
from riskpo.start import load_data


def test_the_mixed_task_has_four_strata_of_the_stated_sizes():
    task = find_task("embedded:mixed")
    questions = task_questions(task, 0)
    assert len(questions) == task.questions == len({q.id for q in questions})
    assert set(Counter(q.meta["stratum"] for q in questions)) == set(task.warm_share)
    for q in questions:
        a, b = q.prompt.rstrip("=").split("+")
        assert len(a) == len(b) == 4 and int(q.gold[::-1]) == int(a) + int(b)
        size_a, size_b = map(int, q.meta["stratum"].split("+"))
        assert int(a) < 10**size_a and int(b) < 10**size_b
    assert sum(task.warm_share.values()) == pytest.approx(1.0)


def test_the_demo_asks_what_it_always_asked():
    questions, held_out = load_data(TrainConfig(eval_questions=200))
    everything = {q.id: q for q in build_questions(6000, 0)}
    assert len(held_out) == 200 and {q.id for q in questions + held_out} == set(everything)
    assert TASKS["embedded"].warm_share is None and TASKS["embedded"].warm_target == 0.4


def test_the_warm_start_shows_each_stratum_its_share(monkeypatch):
    shown = Counter()
    import riskpo.arithmetic

    supervised = riskpo.arithmetic._supervised_batch

    def count(tokenizer, questions):
        shown.update(q.meta["stratum"] for q in questions)
        return supervised(tokenizer, questions)

    monkeypatch.setattr(riskpo.arithmetic, "_supervised_batch", count)
    task, tokenizer = find_task("embedded:mixed"), build_tokenizer()
    warm_start(
        build_model(tokenizer, 0), tokenizer, task_questions(replace(task, questions=400), 0),
        lambda: 1.0, target=0.5, seed=0, check_every=40, share=task.warm_share,
    )  # fmt: skip
    total = sum(shown.values())
    assert total == 40 * 64
    for stratum, share in task.warm_share.items():
        assert shown[stratum] / total == pytest.approx(share, abs=0.03)


def test_names():
    with pytest.raises(ValueError, match="expected one of embedded, embedded:mixed"):
        find_task("embedded:hard")
    mixed = TrainConfig(data="embedded:mixed")
    config, overrides = resolve(mixed)
    validate(config)
    assert not overrides and config.learning_rate == 3e-4 and config.max_response_tokens == 8
    assert resolve(TrainConfig())[1] == {"baseline": "leave-one-out"}  # the demo, and it alone
    validate(resolve(replace(mixed, model="somewhere"))[0])
    with pytest.raises(ValueError, match="model=None"):
        validate(resolve(TrainConfig(data="sums.jsonl"))[0])
    with pytest.raises(ValueError, match="data=None"):
        validate(resolve(TrainConfig(model="somewhere"))[0])
