"""The plan from configs alone, and its terms by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from riskpo.config import LoraConfig, MemoryConfig, TrainConfig, resolve
from riskpo.memory_plan import run_plan
from riskpo.memory_plan.budget import GIB, MIB, Workload, attention_flop, budget, longest
from riskpo.memory_plan.command import CHECKPOINTS, LADDER, WIDTH, find_card, plan_command
from riskpo.memory_plan.model_shape import find_shape, shape_of_model
from riskpo.memory_plan.run_plan import plan_run
from riskpo.model.lora import attach_lora
from tests.toy import tiny_config, tiny_policy


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: torch.device("meta") does not know patched constructors, and 8e9 parameters would
    be allocated."""


# parameters as published on the models' cards
PUBLISHED = {
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_their_published_size(name):
    assert find_shape(name).parameters == PUBLISHED[name]


def test_a_folder_s_config_is_enough(tmp_path):
    tiny_config(14).save_pretrained(tmp_path)
    shape = find_shape(str(tmp_path))
    assert shape.parameters == sum(p.numel() for p in tiny_policy().model.parameters())
    with pytest.raises(ValueError, match="Qwen2.5-1.5B, Qwen2.5-7B, Llama-3.1-8B"):
        find_shape("no/such-model")


def test_terms_by_hand():
    """Llama-3.1-8B in bfloat16: 16 bytes a parameter, 262 kB of checkpoints a token, 131 kB of
    keys and values a token."""
    shape, work = find_shape("Llama-3.1-8B"), Workload(1000, sequences=3)
    found = budget(shape, CHECKPOINTS, work)
    assert sum(found.fixed.values()) == 14 * shape.parameters  # and a gradient while it updates
    assert found.update["gradients"] == found.step["gradients"] == 2 * shape.parameters
    assert found.update["checkpoints"] == 1000 * 32 * 4096 * 2
    assert found.sampling["keys and values"] == 3000 * 131072
    assert found.step["gradients in float32"] == 2 * shape.parameters
    assert found.step["temporaries of the step"] == 2 * 128256 * 4096  # a gradient twice
    host = budget(shape, replace(CHECKPOINTS, optimizer="host"), work)
    assert sum(host.fixed.values()) == 2 * shape.parameters
    assert attention_flop(shape, CHECKPOINTS, 1000) == 9 * 1e6 * 4096 * 32


def test_terms_of_sampling_by_hand():
    """Qwen2.5-1.5B in bfloat16: 28,672 bytes of keys and values a token; 66,048 for each token of
    the prompts, which are read at once; a mask over pairs of the same prompt."""
    shape, work = find_shape("Qwen2.5-1.5B"), Workload(1, sequences=3, context=2000, prompt=700)
    found = budget(shape, CHECKPOINTS, work)
    assert found.prompts == {
        "keys and values": 2100 * 28672,
        "activations of one layer": 2100 * 66048,
        "mask of the padding": 3 * 700**2,
    }
    assert found.sampling == {
        "keys and values": 6000 * 28672,
        "logits of one step": 3 * 151936 * 26,
    }
    assert budget(shape, CHECKPOINTS, replace(work, context=600)).prompts["keys and values"] == (
        1800 * 28672
    )
    short = replace(work, sequences=2000, context=701)
    many = budget(shape, CHECKPOINTS, short)
    assert many.moments["prompts"] > many.moments["sampling"]
    assert many.peak == sum(many.fixed.values()) + many.moments["prompts"]
    assert many.increase() == many.peak - many.fixed["weights"]


def test_terms_on_the_cpu_by_hand():
    """Temporaries of the largest tensor, which for Llama is the embedding; gradients that become
    float32 at once where the state is on the host; nothing moves away."""
    shape, work = find_shape("Llama-3.1-8B"), Workload(1000, on_host=True)
    largest = 128256 * 4096
    for state, bytes_each in (("device", 8), ("8bit", 20), ("host", 8)):
        found = budget(shape, replace(CHECKPOINTS, optimizer=state), work)
        assert found.step["temporaries of the step"] == bytes_each * largest, state
        gradients = found.step["gradients"], found.step["gradients in float32"]
        assert sum(gradients) == 4 * shape.parameters
        assert (gradients[1] == 0) == (state == "host") and not found.host
    assert found.fixed["optimiser moments"] == 8 * shape.parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_switch_buys_something(name):
    """In the order of the ladder no update grows, up to the head each is much smaller, and no
    longest context shrinks."""
    shape, work = find_shape(name), Workload(65536, sequences=1)
    columns = [(m, replace(work, plain_head=plain)) for _, m, plain in LADDER]
    updates = [sum(budget(shape, m, w).update.values()) for m, w in columns]
    assert updates == sorted(updates, reverse=True) and updates[5] < updates[4] < updates[3]
    assert all(2 * after < 3 * before for before, after in zip(updates, updates[1:4], strict=False))
    reach = [longest(shape, m, w, 139 * GIB) for m, w in columns]
    assert reach == sorted(reach) and reach[-1] > 4 * reach[0]


def test_columns_without_checkpointing_and_with_the_mask():
    """Qwen2.5-1.5B at 1000 tokens in bfloat16: of every layer two norms' inputs and outputs
    (8 bytes a column each, the second beside the attention's), queries and keys, the output, the
    residual stream, the log-sum-exp and four of the MLP; the mask once as bool and once a layer."""
    shape, work = find_shape("Qwen2.5-1.5B"), Workload(1000, plain_head=True)
    (_, masked, _), (_, plain, _), (_, kept, _), *_ = LADDER
    every = budget(shape, plain, work).update["activations of all layers"]
    layer = 2 * 8 * 1536 + 2 * (2 * 1536 + 2 * 256) + 4 * 12 + 2 * 2 * 1536 + 4 * 2 * 8960
    assert every == 1000 * 28 * layer
    found = budget(shape, masked, work).update
    assert found["[T, T] masks"] == 1000**2 * (1 + 28 * 2)
    assert found["activations of all layers"] == every
    found = budget(shape, kept, work).update
    assert found["checkpoints"] == 1000 * 28 * 1536 * 2 and "activations of all layers" not in found


TURNS = {"head workspace", "activations of one layer", "MLP of one layer", "attention backward"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_turn_of_the_update_is_told_and_the_largest_counts(name):
    shape = find_shape(name)
    for tokens in (128, 2**13, 2**20):
        for _, memory, plain in LADDER:
            found = budget(shape, memory, Workload(tokens, plain_head=plain))
            assert {*found.update, *found.other} >= TURNS and not {*found.update} & {*found.other}
            told = found.update | found.other
            kept = sum(size for term, size in told.items() if term not in TURNS)
            layer = max(told["MLP of one layer"], told["attention backward"])
            layer += told["activations of one layer"]
            assert found.moments["update"] == pytest.approx(
                kept + max(layer, told["head workspace"])
            )


def test_a_plain_head_s_logits_by_hand():
    """Log-softmax and two gradients in float32 for every row that meets the head; in bfloat16 the
    logits themselves besides. Prompts that stay away are counted by nobody."""
    shape = find_shape("Qwen2.5-1.5B")
    for size, bytes_each in ((4, 12), (2, 14)):
        work = Workload(4096, bytes_per_weight=size, plain_head=True, head_tokens=0)
        none = budget(shape, CHECKPOINTS, work).other["head workspace"]
        for rows, given in ((1024, 1024), (4096, None)):
            found = budget(shape, CHECKPOINTS, replace(work, head_tokens=given))
            assert found.update["head workspace"] - none == rows * bytes_each * shape.vocab


def test_longest_context_is_the_last_that_fits():
    shape, work, room = find_shape("Qwen2.5-1.5B"), Workload(1), 70 * GIB
    tokens = longest(shape, CHECKPOINTS, work, room)
    peaks = [
        budget(shape, CHECKPOINTS, replace(work, tokens=n, context=n)).peak
        for n in (tokens, tokens + 128)
    ]
    assert peaks[0] <= room < peaks[1]
    assert longest(shape, CHECKPOINTS, work, 1 * GIB) == 0


def row(printed, name):
    """The cells of a printed row."""
    (line,) = [x for x in printed.splitlines() if x.startswith(name)]
    return [cell.strip() for cell in line.partition("│")[2].split("│")]


def test_the_command_prints_the_plan(capsys):
    plan_command(["--model", "Qwen2.5-7B", "--context", "65536", "--gpu", "80", "H200"])
    shown = capsys.readouterr().out
    for word in ("7.62e9 parameters", "keys and values", "memory.attention='auto'", "TFLOP"):
        assert word in shown, word
    assert max(map(len, shown.splitlines())) <= WIDTH
    labels = [label for label, *_ in LADDER]
    header = next(x for x in shown.splitlines() if x.startswith("GiB at the peak"))
    assert [x.strip() for x in header.split("┃")][1:] == labels
    for term in TURNS:
        assert "-" not in row(shown, f"update: {term}"), term
    # offloading changes the checkpoints alone; the tiles give the turn to the attention
    assert row(shown, "update: checkpoints")[:3] == ["-", "-", "12.2"]
    mlp, attention = row(shown, "update: MLP of"), row(shown, "update: attention backward")
    assert [x.startswith("(") for x in mlp] == [True] * 3 + [False] * 2 + [True] * 3
    assert [x.startswith("(") for x in attention] == [True] * 5 + [False] * 3
    masks, every = row(shown, "update: [T, T] masks"), row(shown, "update: activations of all")
    assert [x != "-" for x in masks] == [True] + [False] * 7
    assert [x != "-" for x in every] == [True] * 2 + [False] * 6
    assert "80 GB, 8" in shown and "H200, 1" in shown
    for label in labels:
        assert len(row(shown, f"{label} ")) == 4, label
    # 8 prompts of 512 tokens; the keys and values of all layers are 57,344 bytes of each
    assert "512 of it the prompt" in " ".join(shown.split())
    assert row(shown, "prompts: keys and values") == ["0.2"] * 8
    assert row(shown, "all while reading prompts")[-1] == "14.9"


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--model", "Qwen2.5-7B", "--gpu", "big"], "expected a size in GB"),
        (["--model", "Qwen2.5-7B", "--context", "0"], "greater than 0"),
        (["--model", "Qwen2.5-7B", "--dtype", "int8"], "'float32', 'bfloat16'"),
    ],
)
def test_bad_input_is_refused(arguments, why):
    with pytest.raises(ValueError, match=why):
        plan_command(arguments)


def test_cards():
    assert find_card("24gb").bytes == find_card("24").bytes < 24 * GIB
    assert find_card("h200").name == "H200"


def test_a_run_s_plan_and_its_outcome():
    config, _ = resolve(TrainConfig())
    plan = plan_run(config, tiny_policy().model, 16)
    assert plan.predicted is not None and plan.predicted.fixed["master copies"] == 0
    assert "checkpoints" not in plan.predicted.update
    assert plan.lines() == ["memory plan: below 0.1 GiB on cpu"] and plan.capacity > GIB
    assert plan.predicted.increase() < 64 * 2**20  # the demo is small, and said to be
    assert "predicted" in plan.outcome() and "measured" in plan.outcome()
    plan.capacity = 1.0
    assert "hardly fit" in plan.lines()[1]
    large = replace(config, max_response_tokens=100_000)
    plan = replace(plan_run(large, tiny_policy().model, 16), capacity=float("inf"))
    first, second, third = plan.lines()
    assert "GiB on cpu: updating" in first and "largest: " in second
    assert "the longest prompt of the data has 16 tokens, a response at most 100000" in third


def test_frozen_weights_have_no_state():
    model = tiny_policy().model
    model.model.requires_grad_(False)
    predicted = plan_run(resolve(TrainConfig())[0], model, 16).predicted
    assert predicted.step["gradients"] == 4 * model.lm_head.weight.numel()


def test_frozen_norms_and_products_keep_no_input():
    """LoRA in the attention alone: no norm keeps what its weight multiplies, and the MLP neither
    its norm's output nor its product. In all layers the MLP keeps both."""
    everything = tiny_policy().model
    shapes = [shape_of_model(everything)]
    for targets in (("all-linear",), ("q_proj", "v_proj")):
        adapted = tiny_policy().model
        attach_lora(adapted, LoraConfig(rank=2, targets=targets), 0)
        shapes.append(shape_of_model(adapted))
    for size in (2, 4):
        work = Workload(1000, size)
        full, linear, attention = (
            budget(s, MemoryConfig(), work).update["activations of all layers"] / 1000
            for s in shapes
        )
        layers, H, I = 2, 32, 64  # noqa: E741
        assert full - linear == layers * 2 * H * size
        assert linear - attention == layers * (H + I) * size
        head, frozen = (budget(s, MemoryConfig(), work) for s in shapes[:2])
        dW, norm = 4 * shapes[0].vocab * H, 1000 * H * size
        both = [(b.update | b.other)["head workspace"] for b in (head, frozen)]
        assert both[0] - both[1] == dW + norm


def test_gradients_are_planned_where_they_are():
    """None is there while it samples. A single micro-batch makes them while its activations go; a
    second one finds all of them. A tied head's own waits for the embedding's, which is the end; a
    frozen head has none, and no sum of its gradient."""
    shape = replace(find_shape("Qwen2.5-1.5B"), tied=True)
    P, head = shape.parameters, shape.vocab * shape.hidden
    for work in (Workload(65536, 4, micro_batches=1), Workload(65536, 4)):
        found = budget(shape, MemoryConfig(), work)
        assert "gradients" not in found.fixed | found.prompts | found.sampling
        assert found.step["gradients"] == 4 * P
        once = work.micro_batches == 1
        assert (found.update["gradients"] < P) if once else (found.update["gradients"] == 4 * P)
        assert found.update["gradient of the head"] == 4 * head
    for batches in (1, 2):  # with few tokens the end of the backward counts
        few = budget(shape, MemoryConfig(), Workload(8, 4, micro_batches=batches))
        assert few.moments["update"] == 4 * P + 4 * head * batches
    untied = replace(shape, tied=False)
    assert "gradient of the head" not in budget(untied, MemoryConfig(), Workload(65536, 4)).update
    once = budget(untied, MemoryConfig(), Workload(65536, 4, micro_batches=1)).update
    assert once["gradient of the head"] == 4 * head
    frozen = budget(replace(shape, trainable=10**6, head_learns=False), CHECKPOINTS, Workload(8, 4))
    learns = budget(shape, CHECKPOINTS, Workload(8, 4))
    both = [(b.update | b.other)["head workspace"] for b in (learns, frozen)]
    assert both[0] - both[1] == 4 * head


def test_a_run_is_planned_by_its_micro_batches():
    """Several of them: gradients wait beside the activations."""
    config = replace(resolve(TrainConfig())[0], micro_batch_tokens=10**6)
    model = tiny_policy().model
    one = plan_run(config, model, 400).predicted
    several = plan_run(replace(config, micro_batch_tokens=450), model, 400).predicted
    assert several.update["gradients"] == several.step["gradients"] == one.step["gradients"]
    assert one.update["gradients"] < one.step["gradients"]


def test_a_plan_beyond_the_machine_is_said_on_the_cpu_too(monkeypatch):
    monkeypatch.setattr(run_plan, "memory_of_this_machine", lambda: 1.0 * MIB)
    plan = plan_run(resolve(TrainConfig())[0], tiny_policy().model, 16)
    assert "hardly fit" in plan.lines()[-1]
