"""Two gloo processes: one tracker, one set of advantages, one gradient."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'riskpo[trl]'")

from tests.integrations.test_trl_loss import ROUNDING, batch, distance, old_logprob  # noqa: E402
from tests.integrations.trl_toy import trainer  # noqa: E402
from tests.integrations.trl_two_ranks import BATCH, LOSS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.integrations.trl_two_ranks", str(folder)]
    started = []
    for rank in ("0", "1"):
        with open(folder / f"log-{rank}.txt", "w", encoding="utf-8") as log:
            env = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
            started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=480) for process in started]
    finally:
        for process in started:
            process.kill()
    logs = [(folder / f"log-{rank}.txt").read_text(encoding="utf-8")[-3000:] for rank in (0, 1)]
    assert codes == [0, 0], "\n".join(logs)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_both_ranks_hold_the_same_tracker_and_the_same_model(ranks):
    first, second = ranks
    assert first["state"] == second["state"] and first["state"]["generation_batches"] == 2
    assert first["logged"] == second["logged"] and len(first["logged"]) == 12
    assert first["weights"] == pytest.approx(second["weights"], rel=1e-12)


def test_each_rank_trains_on_its_own_rows_of_one_set_of_advantages(ranks):
    rows = [row for rank in ranks for row in rank["rows"]]
    assert [len(rank["rows"]) for rank in ranks] == [6, 6]
    assert sorted(a for _, a in rows) == pytest.approx(sorted(ranks[0]["logged"]), abs=1e-6)
    assert len({a for _, a in rows}) > 1


def test_all_ranks_resume_from_what_one_wrote(ranks):
    for rank in ranks:
        assert rank["resumed"] == ranks[0]["state"]


def test_it_does_not_matter_which_rank_holds_which_rows(ranks):
    in_order, shuffled = ranks[0]["arranged"]
    assert ranks[1]["arranged"] == ranks[0]["arranged"]
    assert in_order == shuffled and len(set(in_order)) > 2


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_ranks_and_micro_batches_give_one_gradient(ranks, tmp_path, loss_type):
    whole = trainer(
        tmp_path, **{**BATCH, **LOSS, "per_device_train_batch_size": 6}, loss_type=loss_type
    )
    inputs = batch(whole.model.config.vocab_size)
    inputs["old_per_token_logps"] = old_logprob(whole, inputs)
    whole.model.train()
    whole.current_gradient_accumulation_steps = whole.args.steps_per_generation = 1
    whole._compute_loss(whole.model, inputs).backward()
    expected = torch.cat([p.grad.flatten() for p in whole.model.parameters()])
    for rank in ranks:
        assert distance(torch.tensor(rank[loss_type]), expected) < ROUNDING


@pytest.mark.parametrize("units", ["model", "head"])
def test_a_head_sharded_by_fsdp2_gets_the_mean_gradient(ranks, units):
    """Alone, it comes as a DTensor whose gradient nobody else would reduce."""
    for rank in ranks:
        expected = rank["unsharded"]
        assert rank[f"sharded-{units}"].keys() == expected.keys()
        for name, gradient in rank[f"sharded-{units}"].items():
            gap = distance(torch.tensor(gradient), torch.tensor(expected[name]))
            assert gap < ROUNDING, (name, gap)
