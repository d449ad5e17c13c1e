"""Every policy loss on the page: fp64 parity, numbers by hand, planted faults, and one more."""

import dataclasses
import inspect
import math

import pytest
import torch

from riskpo.algorithms import STRATEGIES, LossOptions, Strategy, group, loss_options
from riskpo.config import TrainConfig
from riskpo.group_advantages import over_std
from riskpo_kernels import clipped_surrogate, reference, risk
from riskpo_kernels.policy_loss import formulas
from riskpo_kernels.policy_loss.formulas import KL, LOSSES, PolicyLoss, Term
from riskpo_kernels.reference.surrogate import OBJECTIVES
from tests.compare import assert_all_close_as_plain
from tests.surrogate_inputs import ALL, check, padded, run, tokens

PAIRS = [(name, ratio) for name, entry in LOSSES.items() for ratio in entry.ratios]
TIGHT = {  # bounds inside the spread of the inputs' ratios, and gates that are not flat there
    "sequence": {"clip_low": 0.04, "clip_high": 0.05},
    "token": {"clip_low": 0.15, "clip_high": 0.1},
    "gmpo": {"clip_low": 0.1, "clip_high": 0.15},
    "sapo": {"tau_pos": 3.0, "tau_neg": 5.0},
}
EXTRA = {"kl_coef": 0.1, "entropy_coef": 0.05}


def settings(name, ratio):
    own = TIGHT.get(name, TIGHT[ratio])
    return {"loss": name, "ratio": ratio, "loss_options": own}


@pytest.mark.parametrize("layout", ["flat", "masked", "padded"])
@pytest.mark.parametrize("name, ratio", PAIRS)
def test_every_loss_matches_float64(name, ratio, layout, device):
    x, cu, mask = tokens(device)
    where = {"cu_seqlens": cu, "mask": mask if layout == "masked" else None}
    if layout == "padded":
        where = {"mask": padded(torch.ones(len(mask), device=device), cu, fill=0.0)}
        x = {n: v if len(v) == len(cu) - 1 else padded(v, cu, fill=0.1) for n, v in x.items()}
    got, truth = check(x, backend="torch", **settings(name, ratio), **EXTRA, **where)
    if name != "sapo":
        low, high = truth["clip_low_fraction"], truth["clip_high_fraction"]
        assert min(low, high, 1 - low - high) > 0.05, (low, high)
        assert abs(got["clip_fraction"] - truth["clip_fraction"]) < 1e-6


@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize("kl", KL)
def test_every_divergence_matches_float64(kl, ratio, device):
    x, cu, mask = tokens(device)
    check(x, backend="torch", kl=kl, ratio=ratio, cu_seqlens=cu, mask=mask, kl_coef=0.5)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_prompt_mean_and_the_mask_match_float64(ratio, device):
    x, cu, mask = tokens(device)
    lengths = torch.zeros(len(cu) - 1, dtype=torch.long, device=device)
    segment = torch.arange(len(lengths), device=device).repeat_interleave(cu.diff())
    lengths = lengths.index_add(0, segment, mask.long())
    prompts = lengths.view(4, 4).sum(1).repeat_interleave(4)  # four responses to each of four
    words = {"cu_seqlens": cu, "mask": mask, "ratio": ratio, "aggregate": "prompt-mean"}
    check(x, backend="torch", prompt_tokens=prompts, **words, **EXTRA)
    whole = run(x, prompt_tokens=prompts, **words)
    parts = []
    for a, b in ((0, 3), (3, 16)):  # a prompt is cut in two
        first, last = int(cu[a]), int(cu[b])
        part = {n: v[a:b] if len(v) == 16 else v[first:last] for n, v in x.items()}
        own = {"cu_seqlens": cu[a : b + 1] - cu[a], "mask": mask[first:last], "denominator": 4}
        parts.append(run(part, **words | own, prompt_tokens=prompts[a:b]))
    torch.testing.assert_close(sum(p["loss"] for p in parts), whole["loss"])
    words |= {"aggregate": "token-mean", "clip_low": 9.0, "clip_high": 9.0}
    _, masked = check(x, backend="torch", off_policy_mask_threshold=0.02, **words)
    _, free = check(x, backend="torch", **words)
    more = masked["zero_coefficient_fraction"] - free["zero_coefficient_fraction"]
    assert more > 0.05, "sequences are masked"
    sent = masked["dlogprob"] != 0
    assert (sent & (x["advantage"][segment] < 0)).any(), "and others with a negative advantage not"


# two responses of two tokens: ratios 2 and 1/2 to an advantage of 1, 1 and 4 to one of -1
LN2 = math.log(2)
OLD, LOG_RATIO = [-2.0, -1.0, -3.0, -2.0], [LN2, -LN2, 0.0, 2 * LN2]


def golden(backend, device, **options):
    old = torch.tensor(OLD, dtype=torch.float64, device=device)
    new = old + torch.tensor(LOG_RATIO, dtype=torch.float64, device=device)
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64, device=device)
    x = {"logprob": new, "old_logprob": old, "advantage": advantage}
    given = {"cu_seqlens": torch.tensor([0, 2, 4], device=device), "backend": backend}
    if "kl" in options:
        x["ref_logprob"] = old + LN2
    return run(x, **given | {"aggregate": "sequence-sum", "denominator": 1} | options)


def near(got, expected):
    expected = torch.tensor(expected, dtype=torch.float64, device=got.device)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", ALL)
def test_cispo_golden(backend, device):
    """Weights 2 to 1.5, 1/2 to 0.8, 1, and 4 to 1.5: -w a log pi, and its slope -w a."""
    words = {"ratio": "token", "clip_low": 0.2, "clip_high": 0.5}
    got = golden(backend, device, loss="cispo", **words)
    near(got["dlogprob"], [-1.5, -0.8, 1.0, 1.5])
    terms = (-1.5 * (LN2 - 2), -0.8 * (-LN2 - 1), -3.0, 1.5 * (2 * LN2 - 2))
    near(got["loss"], sum(terms))
    near(got["clip_high_fraction"], 0.5)
    near(golden(backend, device, loss="cispo", ratio="token")["dlogprob"], [-2.0, -0.5, 1.0, 4.0])


@pytest.mark.parametrize("backend", ALL)
def test_icepop_golden(backend, device):
    """Band [0.4, 3]: 2, 1/2 and 1 pass as they are, 4 does not: -2, -1/2, 1 and 0."""
    got = golden(backend, device, loss="icepop", ratio="token", clip_low=0.6, clip_high=2.0)
    near(got["loss"], -1.5)
    near(got["dlogprob"], [-2.0, -0.5, 1.0, 0.0])
    near(got["clip_high_fraction"], 0.25)


@pytest.mark.parametrize("backend", ALL)
def test_sapo_golden(backend, device):
    """tau 2 for a > 0: -2 sigmoid(2 (r - 1)) at r = 2 and 1/2, that is sigmoid(2) and sigmoid(-1);
    tau 1 for a < 0: 4 sigmoid(r - 1) at r = 1 and 4, that is 1/2 and sigmoid(3)."""
    temperatures = {"tau_pos": 2.0, "tau_neg": 1.0}
    got = golden(backend, device, loss="sapo", ratio="token", loss_options=temperatures)
    up, down, far = (1 / (1 + math.exp(-z)) for z in (2, -1, 3))
    near(got["loss"], -2 * up - 2 * down + 2 + 4 * far)
    slopes = -4 * up * (1 - up) * 2, -4 * down * (1 - down) / 2, 1.0, 4 * far * (1 - far) * 4
    near(got["dlogprob"], slopes)


@pytest.mark.parametrize("backend", ALL)
def test_gmpo_golden(backend, device):
    """a = 1: log-ratios ln 2 and -ln 2, the first held to 0.4: r = exp((0.4 - ln 2) / 2). a = -1: 0
    and 2 ln 2, both above -0.4: r = exp(ln 2) = 2. One term each; a held token has no slope."""
    r = math.exp((0.4 - LN2) / 2)
    got = golden(backend, device, loss="gmpo", aggregate="sequence-mean")
    near(got["loss"], -r + 2)
    near(got["dlogprob"], [0.0, -r / 2, 1.0, 1.0])
    near(got["clip_high_fraction"], 0.25)  # half of one sequence of two
    near(got["ratio_max"], 2.0)


@pytest.mark.parametrize("backend", ALL)
def test_off_policy_mask_golden(backend, device):
    """The mean of old - new is 0 and -ln 2. Above -1 both are masked, of which only the second has
    a negative advantage; above -1/2 none is."""
    words = {"loss": "clip", "ratio": "token", "clip_low": 9.0, "clip_high": 9.0}
    near(golden(backend, device, **words, off_policy_mask_threshold=-0.5)["loss"], -2.5 + 5)
    got = golden(backend, device, **words, off_policy_mask_threshold=-1.0)
    near(got["loss"], -2.5)
    near(got["dlogprob"], [-2.0, -0.5, 0.0, 0.0])


@pytest.mark.parametrize("backend", ALL)
def test_divergences_golden(backend, device):
    """log pi_ref = old + ln 2, so u = ln 2 - x: 0, 2 ln 2, ln 2, -ln 2; exp(u): 1, 4, 2, 1/2."""
    k3 = [0.0, 3 - 2 * LN2, 1 - LN2, -0.5 + LN2]
    k2_slope = [0.0, -2 * LN2, -LN2, LN2]
    r = [2.0, 0.5, 1.0, 4.0]
    free = {"ratio": "token", "clip_low": 9.0, "clip_high": 9.0, "kl_coef": 1.0}
    surrogate = [-2.0, -0.5, 1.0, 4.0]
    for kl, values, slopes in (
        ("k3", k3, [0.0, -3.0, -1.0, 0.5]),
        ("k3+", k3, k2_slope),
        ("k3-unbiased", [a * b for a, b in zip(r, k3, strict=True)],
         [a * b for a, b in zip(r, k2_slope, strict=True)]),
    ):  # fmt: skip
        got = golden(backend, device, kl=kl, **free)
        near(got["loss"], sum(surrogate) + sum(values))
        near(got["kl"], sum(values) / 4)
        near(got["dlogprob"], [a + b for a, b in zip(surrogate, slopes, strict=True)])


@pytest.mark.parametrize("backend", ALL)
def test_prompt_mean_golden(backend, device):
    """Both responses answer one prompt, with 4 tokens: the mean of the four; of two prompts, whose
    other responses had 2 and 0 tokens more: (sum of the first / 4 + sum of the second / 2) / 2."""
    free = {"ratio": "token", "clip_low": 9.0, "clip_high": 9.0, "aggregate": "prompt-mean"}
    for prompts, denominator, loss in (
        ([4, 4], None, (-2.5 + 5) / 4),
        ([4, 2], 2, (-2.5 / 4 + 5 / 2) / 2),
    ):
        given = {"prompt_tokens": torch.tensor(prompts, device=device), "denominator": denominator}
        near(golden(backend, device, **free, **given)["loss"], loss)


@pytest.mark.parametrize("name, ratio", PAIRS)
def test_a_nan_without_weight_is_not_read_and_one_with_weight_is_seen(name, ratio, device):
    x, cu, mask = tokens(device)
    words = {"cu_seqlens": cu, "mask": mask, **settings(name, ratio)}
    segment = torch.arange(len(cu) - 1, device=device).repeat_interleave(cu.diff())
    x["advantage"][2] = 0.0
    for leaf in ("logprob", "old_logprob"):
        poisoned = x | {leaf: torch.where(segment == 2, float("nan"), x[leaf])}
        for backend in ALL:
            got, clean = (run(y, backend=backend, **words) for y in (poisoned, x))
            assert torch.equal(got["loss"], clean["loss"]), (leaf, backend)
            assert torch.equal(got["dlogprob"], clean["dlogprob"]), (leaf, backend)
            seen = x | {leaf: torch.where(segment == 4, float("nan"), x[leaf])}
            assert run(seen, backend=backend, **words)["loss"].isnan(), (leaf, backend)


def test_the_backends_of_one_name_are_one_pass(device):
    x, cu, mask = tokens(device)
    results = [
        run(x, cu_seqlens=cu, mask=mask, backend=name, **EXTRA) for name in ("torch", "triton")
    ]
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("name, ratio", [("sapo", "token"), ("gmpo", "sequence")])
def test_a_loss_is_one_node_of_a_graph(name, ratio):
    x, cu, mask = tokens(lengths=(3, 0, 4))
    torch._dynamo.reset()
    options = {"cu_seqlens": cu, "mask": mask, **settings(name, ratio)}
    compiled = torch.compile(lambda x: clipped_surrogate(**x, **options), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    assert torch.equal(compiled(x).loss, clipped_surrogate(**x, **options).loss)


def planted(module, name, right, wrong):
    """The function of that name with one expression of its source changed."""
    source = inspect.getsource(getattr(module, name))
    assert right in source
    scope = dict(vars(module))
    exec(source.replace(right, wrong), scope)
    return scope[name]


def risk_matches_float64():
    scores = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runs = (
        (risk.mvar_advantage, torch.float32),
        (reference.mvar_advantage, torch.float64),
        (reference.mvar_advantage, torch.float32),
    )
    found = ({"advantage": op(scores.to(dtype), -0.5, 0.5)} for op, dtype in runs)
    assert_all_close_as_plain(*found)


def loss_matches(name):
    return lambda: test_every_loss_matches_float64(name, "token", "flat", torch.device("cpu"))


def k3_matches():
    test_every_divergence_matches_float64("k3", "token", torch.device("cpu"))


FAULTS = {  # module, function, its expression, the fault; the comparison that has to see it
    "clip bound": (formulas, "clip", "1 + clip_high", "1.01 + clip_high", loss_matches("clip")),
    "cispo weight": (formulas, "cispo", "slope * lp", "slope * x", loss_matches("cispo")),
    "sapo gate": (formulas, "sapo", "tau_pos, tau_neg)", "tau_neg, tau_pos)", loss_matches("sapo")),
    "k3": (formulas, "k3_value", "1 / n", "1 / (n + 0.01)", k3_matches),
    "risk weights": (risk, "mvar_advantage", "(1 + omega)", "(1.01 + omega)", risk_matches_float64),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_formula_turns_the_comparison_red(name, monkeypatch):
    module, function, right, wrong, comparison = FAULTS[name]
    comparison()
    faulty = planted(module, function, right, wrong)
    monkeypatch.setattr(module, function, faulty)
    if function in LOSSES:
        entry = dataclasses.replace(LOSSES[function], term=faulty)
        monkeypatch.setitem(LOSSES, function, entry)
    with pytest.raises(AssertionError, match="exceeds"):
        comparison()


def test_a_new_loss_takes_two_places(monkeypatch):
    """The formula with its line in LOSSES, and a row of the trainer's table."""

    def reinforce(x, a, lp, ratio, *, scale=1.0):
        """-scale a lp."""
        return Term(-scale * a * lp, -scale * a, ratio(x)[0])

    monkeypatch.setitem(LOSSES, "reinforce", PolicyLoss(reinforce))
    row = Strategy(group(over_std), loss=LossOptions("token", loss="reinforce"))
    monkeypatch.setitem(STRATEGIES, "reinforce", row)

    config = TrainConfig(algorithm="reinforce", max_response_tokens=16)
    options = dataclasses.asdict(loss_options(row, config))
    x, cu, _ = tokens()
    got = run(x, cu_seqlens=cu, **options)
    doubled = run(x, cu_seqlens=cu, **options | {"loss_options": {"scale": 2.0}})
    weight = 1 / cu.diff().clamp(min=1).repeat_interleave(cu.diff()) / (len(cu) - 1)
    a = (x["advantage"] * x["correction"]).repeat_interleave(cu.diff())
    torch.testing.assert_close(got["dlogprob"], -weight * a)
    torch.testing.assert_close(doubled["loss"], 2 * got["loss"])


def test_every_loss_has_its_reference():
    assert LOSSES.keys() == OBJECTIVES.keys()
