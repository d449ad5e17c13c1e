"""Questions with pictures, and a trainer's view of what was sampled for them."""

import base64
import io
import json

from PIL import Image

from riskpo.config import RunConfig, TrainConfig
from riskpo.model.packing import micro_batches
from riskpo.trainer.parallel import ParallelModel
from riskpo.trainer.update import recompute
from riskpo.types import Question
from riskpo_kernels.causal_lm import find_head
from tests.toy import sample


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def ask(name, *colours, text="<image>find x."):
    return Question(name, text, "3", "geometry3k", images=tuple(png(c) for c in colours))


RED, PAIR = ask("red", "red"), ask("pair", "red", "blue", text="is <image> like <image>?")


def draw(policy, questions, **changes):
    settings = {"responses_per_question": 3, "max_prompt_tokens": 64, "max_response_tokens": 6}
    return sample(policy, questions, stream=(0,), **settings | changes)


def recomputed(policy, rollouts):
    """The trainer's log-probs of the responses, row by row."""
    head = find_head(policy.model)
    parts = micro_batches(rollouts, range(len(rollouts)), 1000)
    assert parts == [[row] for row in range(len(rollouts))]  # never packed
    found = recompute(
        ParallelModel(policy.model), head, rollouts, parts, RunConfig(backend="torch")
    )
    return [found[row][n - 1 :] for row, n in enumerate(rollouts.prompt_len)]


def rows_file(path):
    encoded = base64.b64encode(png("red")).decode()
    rows = [{"problem": f"<image>{i}+1=?", "answer": str(i), "image": encoded} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(model, tmp_path, **changes):
    given = {
        "data": str(rows_file(tmp_path / "rows.jsonl")),
        "model": str(model),
        "run_dir": str(tmp_path / "run"),
        "algorithm": "grpo",
        "reward": "exact",
        "steps": 1,
        "questions_per_step": 2,
        "responses_per_question": 2,
        "max_prompt_tokens": 200,
        "max_response_tokens": 4,
        "eval_questions": 2,
        "eval_samples": 1,
        "backend": "torch",
        "learning_rate": 1e-2,
    }
    return TrainConfig(**given | changes)
