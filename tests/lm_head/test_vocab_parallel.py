"""The vocabulary spread over ranks: forward and gradients of a single rank (trap 37)."""

import contextlib

import pytest
import torch
import torch.distributed as dist

from riskpo_kernels import linear_divergence, linear_logprob, reference, riskpo_loss
from riskpo_kernels.core import process_groups
from riskpo_kernels.reference.ranks import whole
from tests.compare import assert_all_close_as_plain
from tests.conftest import has_triton
from tests.head_inputs import head, split_columns, upstream
from tests.ranks import on_ranks

N, D = 97, 24
SHARDS = {2: (300, 313), 4: (400, 0, 1, 212)}  # V = 613 is prime; one shard is empty
TEMPERATURE = torch.linspace(0.4, 1.5, N)
CASES = {  # options of linear_logprob; dtype and backend have defaults in `case`
    "plain": {},
    "fp64": {"dtype": torch.float64},
    "fp16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 hidden, fp32 head": {"dtype": torch.bfloat16, "head_dtype": torch.float32},
    "softcap, scale, temperature": {"softcap": 5.0, "scale": 1.3, "temperature": 0.7},
    "a temperature a row": {"temperature": TEMPERATURE},
    "dropped blocks": {"dtype": torch.float16, "tail_eps": 2.0**-18},
    "deterministic": {"dtype": torch.bfloat16, "deterministic": True},
    "many chunks": {"memory_mib": 0.06},
    "nobody ignored": {"ignore_index": None},
    "reference": {"backend": "reference"},
    "triton": {"backend": "triton"},
    "triton, dropped blocks": {"dtype": torch.float16, "backend": "triton"},
}


def inputs(dtype, head_dtype=None):
    h, w, b, target = head(N, sum(SHARDS[2]), D, dtype, "cpu")
    head_dtype = head_dtype or dtype
    return h, w.to(head_dtype), b.to(head_dtype), target


def run(op, h, w, b, target, **options):
    """Results and gradients by name. Two rows have no coefficient."""
    h, w, b = (x.detach().clone().requires_grad_() for x in (h, w, b))
    out = op(h, w, target, bias=b, return_entropy=True, **options)
    c, g = (x.index_fill(0, torch.tensor([5, 6]), 0.0) for x in upstream(target.shape[:1], "cpu"))
    e = c.flip(0).index_fill(0, torch.tensor([5, 6]), 0.0)
    parts = zip((out.logprob, out.entropy, out.lse), (c, g, e), strict=True)
    sum((x.double().t() * sent).sum() for x, sent in parts).backward()
    gradients = {"dhidden": h.grad, "dweight": w.grad, "dbias": b.grad}
    return {"logprob": out.logprob, "entropy": out.entropy, "lse": out.lse} | gradients


def columns_of(rank, sizes):
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def case(rank, sizes, name):
    options = {"dtype": torch.float32, "head_dtype": None, "backend": "torch"} | CASES[name]
    dtypes = options.pop("dtype"), options.pop("head_dtype")
    h, w, b, target = inputs(*dtypes)
    if options.get("ignore_index", -100) is not None:
        target[[3, 20]] = -100
    own = {k: options[k] for k in ("softcap", "scale", "temperature") if k in options}
    exact = (x.double() for x in (h, w, b))
    truth = run(reference.linear_logprob, *exact, target, **own)
    plain = run(reference.linear_logprob, h, w, b, target, **own)
    columns = columns_of(rank, sizes)
    got = run(
        linear_logprob, h, w[columns], b[columns], target, vocab_group=dist.group.WORLD, **options
    )
    for part in ("dweight", "dbias"):
        assert got[part].shape[0] == sizes[rank]
        got[part] = whole(got[part], dist.group.WORLD)
    assert_all_close_as_plain(*(split_columns(x, target) for x in (got, truth, plain)))
    everyone = [torch.empty_like(got["dhidden"]) for _ in sizes]
    dist.all_gather(everyone, got["dhidden"])
    assert all(torch.equal(x, everyone[0]) for x in everyone), "ranks differ in dH"


def few_columns(rank, sizes):
    """K targets a row, and a support: ids of every shard, each gathered where it lives."""
    starts = torch.tensor(sizes[:-1]).cumsum(0).unique()
    edges = torch.cat([starts - 1, starts])  # the last id of a shard and the first of the next
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        h, w, b, target = inputs(dtype)
        target[[3, 20]] = -100
        target[30 : 30 + len(edges)] = edges
        g = torch.Generator().manual_seed(2)
        ids = torch.rand(N, sum(sizes), generator=g).argsort(1)[:, :7]
        ids[:, :2] = torch.where(torch.isin(ids[:, :2], edges), -1, ids[:, :2])
        ids[40 : 40 + len(edges), 3:] = -1
        ids[40 : 40 + len(edges), 3] = edges
        ids = torch.where(ids == target[:, None], -1, ids)
        ids[:, 2] = target.masked_fill(target < 0, -1)
        several = torch.cat([target[:, None], ids.masked_fill(ids < 0, -100)], 1)
        choices = [(several, {}), (target, {"support": ids})]
        own = {}
        if dtype == torch.float16:  # which the interpreter multiplies; few rows, for it is slow
            if not has_triton():
                continue
            few = torch.tensor(
                [20, 21, 22, *range(30, 30 + len(edges)), *range(40, 40 + len(edges))]
            )
            h, target, ids = h[few], target[few], ids[few, :5]
            choices, own = [(target, {"support": ids})], {"backend": "triton"}
        for t, options in choices:
            truth = run(reference.linear_logprob, *(x.double() for x in (h, w, b)), t, **options)
            plain = run(reference.linear_logprob, h, w, b, t, **options)
            mine = (h, w[columns_of(rank, sizes)], b[columns_of(rank, sizes)], t)
            got = run(linear_logprob, *mine, vocab_group=dist.group.WORLD, **options, **own)
            for part in ("dweight", "dbias"):
                got[part] = whole(got[part], dist.group.WORLD)
            assert_all_close_as_plain(got, truth, plain)


def adapted(op, h, w, b, target, down, up, **own):
    """Results and gradients of a head with LoRA on it; dweight is that of B."""
    down = down.clone().requires_grad_()

    def head(h, up, target, **options):
        return op(h, w, target, lora=(down, up, 0.5), **own, **options)

    return run(head, h, up, b, target) | {"dA": down.grad}


def adapters(rank, sizes):
    """A on every rank, B spread like the head."""
    mine, group = columns_of(rank, sizes), dist.group.WORLD
    ways = [(torch.float64, {}), (torch.bfloat16, {})]
    ways += [(torch.float32, {"backend": "triton", "tail_eps": 1e-30})] * has_triton()
    for dtype, own in ways:
        h, w, b, target = inputs(dtype)
        target[[3, 20]] = -100
        if own:  # the interpreter is slow
            h, target = h[:24], target[:24]
        down, up = torch.randn(4, D).to(dtype), torch.randn(len(w), 4).to(dtype)
        exact = (x.double() for x in (h, w, b))
        truth = adapted(reference.linear_logprob, *exact, target, down.double(), up.double())
        plain = adapted(reference.linear_logprob, h, w, b, target, down, up)
        here = (h, w[mine], b[mine], target, down, up[mine])
        got = adapted(linear_logprob, *here, vocab_group=group, **own)
        for part in ("dweight", "dbias"):
            got[part] = whole(got[part], group)
        assert_all_close_as_plain(got, truth, plain)


def divergences(rank, sizes):
    """Both heads spread over the ranks, alike."""
    columns, exact = columns_of(rank, sizes), (torch.float64, "torch", N, 1e-9)
    cases = [(kind, *exact) for kind in ("forward_kl", "reverse_kl", "jsd")]
    cases += [("reverse_kl", torch.float32, "triton", 20, 1e-4)] * has_triton()
    for kind, dtype, backend, n, close in cases:
        h, w, b, target = inputs(dtype)
        h, target = h[:n], target[:n]
        teacher, mask = h.flip(1) + h, target % 7 != 0
        b = b.clone()
        b[: sizes[0] + 1 if kind == "forward_kl" else 3] = -torch.inf  # or all of the first rank's
        results = []
        for op, part, group in (
            (reference.linear_divergence, slice(None), None),
            (linear_divergence, columns, dist.group.WORLD),
        ):
            hh, ww, bb = (x.clone().requires_grad_() for x in (h, w[part], b[part]))
            own = {"kind": kind, "mask": mask, "temperature": 0.8, "vocab_group": group}
            own |= {"tail_eps": 1e-13, "backend": backend if group else "reference"}
            out = op(hh, ww, teacher, w[part] / 2, bias=bb, teacher_bias=b[part], **own)
            (out * upstream((n,), "cpu")[0]).sum().backward()
            cut = slice(None) if group else columns
            results.append((out, hh.grad, ww.grad[cut], bb.grad[cut]))
        for x, y in zip(*results, strict=True):
            assert torch.allclose(x, y, rtol=close, atol=close), (kind, backend)


@contextlib.contextmanager
def counted_collectives():
    """The sizes of all collectives of the body, in order."""
    seen, real = [], {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name):
        def collective(*args, **kwargs):
            seen.append(name)
            return real[name](*args, **kwargs)

        return collective

    for name in real:
        setattr(process_groups.dist, name, counting(name))
    try:
        yield seen
    finally:
        for name, function in real.items():
            setattr(process_groups.dist, name, function)


def collectives_are_few_and_alike(rank, sizes):
    h, w, b, target = inputs(torch.float32)
    h.requires_grad_()
    for memory_mib in (300, 0.06):
        mine = w[columns_of(rank, sizes)].clone().requires_grad_()
        options = {"memory_mib": memory_mib, "vocab_group": dist.group.WORLD, "backend": "torch"}
        with counted_collectives() as seen:
            out = linear_logprob(h, mine, target, **options)
            forward = len(seen)
            out.logprob.sum().backward()
        assert seen[0] == "all_gather" and len(seen) == forward + 1
        counts = [0] * len(sizes)
        dist.all_gather_object(counts, forward)
        assert len(set(counts)) == 1, counts
        assert forward == 3 if memory_mib == 300 else forward >= 5, seen


def the_loss_goes_through(rank, sizes):
    h, w, b, target = inputs(torch.float32)
    cu = torch.tensor([0, 9, 9, 30, N], dtype=torch.int32)
    advantage = torch.tensor([1.0, -1.0, 0.5, -2.0])
    old = reference.linear_logprob(h, w, target).logprob + 0.01 * torch.randn(N)
    options = {"cu_seqlens": cu, "clip_low": 0.02, "clip_high": 0.02, "entropy_coef": 0.1}
    columns = columns_of(rank, sizes)
    for backend in ("auto", "reference"):
        results = []
        for part, group in ((slice(None), None), (columns, dist.group.WORLD)):
            hh, ww = (x.clone().requires_grad_() for x in (h, w[part]))
            loss, stats = riskpo_loss(
                hh, ww, target, old, advantage, vocab_group=group, backend=backend, **options
            )
            loss.backward()
            results.append((loss, hh.grad, ww.grad[columns if group is None else slice(None)]))
        for x, y in zip(*results, strict=True):
            assert torch.allclose(x, y, atol=1e-6), backend


def a_row_loses_no_more_than_on_one_rank(rank, sizes):
    """28 blocks a shard just under the threshold: each shard alone would be within the cap of 32
    thresholds, together they would not. 8 blocks a shard may go."""
    lost = {blocks: mass_lost(rank, len(sizes), blocks) for blocks in (28, 8)}
    assert lost[28] <= 32, f"{lost[28]:.1f} thresholds lost"
    assert 6 < lost[8] <= 32, f"{lost[8]:.1f} thresholds lost"


def mass_lost(rank, world, blocks, eps=2.0**-10):
    """Softmax mass of the columns without a gradient, in thresholds, over all ranks."""
    mass = 0.9 * eps / 128  # of one column
    w = torch.full((blocks * 128, 1), mass).log()
    if rank == 0:
        w[:2] = torch.tensor((1 - mass * (world * blocks * 128 - 2)) / 2).log()
    w.requires_grad_()
    options = {"vocab_group": dist.group.WORLD, "tail_eps": eps, "backend": "torch"}
    out = linear_logprob(torch.ones(1, 1), w, torch.zeros(1, dtype=torch.int64), **options)
    out.logprob.sum().backward()
    lost = torch.where(w.grad == 0, w.detach().exp(), 0.0).sum()
    dist.all_reduce(lost)
    return lost / eps


def ranks_that_differ_are_told(rank, sizes):
    h, w, b, target = inputs(torch.float32)
    rows = N - rank
    with pytest.raises(ValueError, match="rows = .* by rank"):
        linear_logprob(h[:rows], w, target[:rows], vocab_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"ids in \[0, 613\)"):
        mine = w[columns_of(rank, sizes)]
        linear_logprob(h, mine, target + 613, vocab_group=dist.group.WORLD)
    linear_logprob(h[:0], w, target[:0], vocab_group=dist.group.WORLD)  # no rows at all
    with pytest.raises(ValueError, match="ProcessGroup of this rank"):
        linear_logprob(h, w, target, vocab_group="model")


def every_case(rank, sizes):
    for name in CASES:
        if "triton" in name and not has_triton():
            continue
        try:
            case(rank, sizes, name)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    few_columns(rank, sizes)
    adapters(rank, sizes)
    divergences(rank, sizes)
    collectives_are_few_and_alike(rank, sizes)
    the_loss_goes_through(rank, sizes)
    a_row_loses_no_more_than_on_one_rank(rank, sizes)
    ranks_that_differ_are_told(rank, sizes)


@pytest.mark.parametrize("world", [4, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_single_rank_s_numbers(world):
    on_ranks(every_case, world, SHARDS[world])
