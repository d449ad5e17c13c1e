"""Checks that need no slow import: settings, files, the reward function.

Nothing here imports torch or transformers, so a mistake shows within a second.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from riskpo.config import ColumnsConfig, TrainConfig, is_embedded, nearest
from riskpo.data.files import is_file, read_file
from riskpo.files import METRICS
from riskpo.model.gguf import is_gguf
from riskpo.rewards.verdict import Outcome

if TYPE_CHECKING:
    from riskpo.types import Question

FIRST_ROWS = 100  # of a file that are read here; the rest is read when the run starts
# Names of the rows of riskpo/algorithms.py, which imports torch.
ALGORITHMS = (
    "riskpo-paper", "riskpo-loo", "riskpo-batch", "riskpo-none", "riskpo-official-easy",
    "riskpo-official-hard", "riskpo-seeking", "riskpo-seeking-loo", "bundle-mean",
    "riskpo-conditional", "riskpo-matched", "difficulty-weighted", "grpo", "dr-grpo", "rloo",
    "maxrl", "rs-grpo", "curverl", "gspo", "dapo", "cispo", "icepop", "sapo", "gmpo",
    "off-policy-mask", "prompt-mean", "distill",
)  # fmt: skip
SAMPLES = ("", "42", "The answer is 42.")  # responses that a reward of yours is tried on


def check_algorithm(name: str) -> None:
    """ValueError for an unknown algorithm; suggests the most similar name."""
    if name not in ALGORITHMS:
        raise ValueError(
            f"algorithm: got {name!r}; expected one of {', '.join(ALGORITHMS)}. "
            + nearest(name, ALGORITHMS, "Check the spelling.")
        )


def check_teacher(config: TrainConfig) -> None:
    """ValueError for "distill" without a teacher, a teacher without it, or settings it ignores."""
    distills, sampler = config.algorithm == "distill", config.sampler
    if distills != (config.teacher is not None):
        raise ValueError(
            f"config: got algorithm={config.algorithm!r} with teacher={config.teacher!r}; expected "
            "algorithm='distill' and a model, or neither. Change one of them."
        )
    useless = {
        "sampler.top_k, top_p or min_p": sampler.top_k or sampler.top_p < 1 or sampler.min_p,
        f"sampler.correction={sampler.correction!r}": sampler.correction != "none",
        "clip_low or clip_high": (config.clip_low, config.clip_high) != (None, None),
    }
    for name in (name for name, given in useless.items() if distills and given):
        raise ValueError(
            f"config: got {name} with algorithm='distill'; expected its default, since the loss is "
            "the divergence over the whole vocabulary. Remove it."
        )


def check_data(source: str | None, columns: ColumnsConfig) -> Question | None:
    """The first question of a local file; ValueError for a file that cannot be read."""
    if source is None or is_embedded(source) or not is_file(source):
        return None
    from riskpo.data.questions import priors_of, to_question

    path = Path(source).expanduser()
    rows = islice(read_file(path), FIRST_ROWS)
    questions = [to_question(row, path, place, columns) for place, row in rows]
    if not questions:
        raise ValueError(f"load_questions: {source} holds no question. Check the file.")
    priors_of(questions, columns.prior)
    return questions[0]


def check_split(source: str | None, split: str | None) -> None:
    """ValueError for the split of anything but a hub data set."""
    if split is not None and (source is None or is_embedded(source) or is_file(source)):
        raise ValueError(
            f"eval: got split={split!r} with data={source!r}; expected a data set of the hub: a "
            "file and an embedded task have no splits. Remove it."
        )


def check_model(name: str | None) -> None:
    """ValueError for a path without a model. A hub name is not looked up."""
    if name is None or "{seed}" in name:
        return
    path = Path(name).expanduser()
    meant = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if path.is_dir():
        if not any(path.glob("*.json")) and not (path / "checkpoints").is_dir():
            raise ValueError(
                f"model: the folder {name} holds neither a config.json nor checkpoints. Give a "
                "folder that save_pretrained or `riskpo train` wrote."
            )
    elif is_gguf(name) and path.is_file():
        return
    elif meant or path.is_file() or is_gguf(name):
        raise ValueError(
            f"model: there is no {'file' if is_gguf(name) else 'folder'} {name}. Give a folder "
            "that save_pretrained or `riskpo train` wrote, a GGUF file, or the name of a model on "
            "the hub."
        )


def check_log(run_dir: str) -> None:
    """ValueError if `run_dir` has no log of a run."""
    if not (Path(run_dir) / METRICS).is_file():
        raise ValueError(
            f"log: there is no {Path(run_dir) / METRICS}. Give the run_dir of a `riskpo train` run."
        )


def try_reward(reward: str, question: Question | None, seconds: float) -> list[str]:
    """Call the user's own reward on sample responses; returns lines that show the results.

    [] for a built-in reward. ValueError if it fails on every sample, RuntimeError if it cannot be
    imported.
    """
    if ":" not in reward:
        return []
    from riskpo.rewards.pool import VerifierPool
    from riskpo.types import Question

    question = question or Question("sample", "6*7=", "42", "arithmetic")
    asked = asdict(replace(question, images=()))
    texts = list(dict.fromkeys([question.gold, *SAMPLES]))
    with VerifierPool(reward, workers=1, seconds=seconds) as pool:
        verdicts = pool.run([(text, asked) for text in texts])
    lost = [v for v in verdicts if v.outcome in (Outcome.CRASH, Outcome.TIMEOUT)]
    if len(lost) == len(verdicts):
        raise ValueError(
            f"reward: {reward} fails on each of {len(texts)} sample responses, such as "
            f"{texts[0][:60]!r} to question {question.id!r}: {lost[0].detail}. It takes (text, "
            "question), where the question has .gold, .prompt, .id and .meta, and returns one "
            "finite number. Mend it."
        )
    said = [f"{v.outcome.value}: {v.detail}" if v in lost else f"{v.reward:g}" for v in verdicts]
    return [
        f"reward {reward} of the response {text[:60]!r} to question {question.id!r}: {what}"
        for text, what in zip(texts[:2], said, strict=False)
    ]


def say(*lines: str) -> None:
    """Print the lines at once, in the first process of a run only."""
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", flush=True)
