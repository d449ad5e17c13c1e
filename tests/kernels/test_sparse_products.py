"""Triton's sparse products: heavy blocks of dW in several jobs, dH in the order of blocks."""

import pytest
import torch

from riskpo_kernels import linear_logprob, reference
from riskpo_kernels.core import matmul as work
from riskpo_kernels.core import softmax as block_selection
from tests.compare import assert_all_close_as_plain
from tests.conftest import has_triton
from tests.head_inputs import head, run

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="needs triton"),
    pytest.mark.usefixtures("recomputed"),
]


@pytest.fixture
def finest(monkeypatch):
    """Every block of more than one tile is divided; counts the parts that were launched."""
    from riskpo_kernels.lm_head import sparse_triton as sparse_launch

    monkeypatch.setattr(block_selection, "DENSE_SHARE", {"cuda": 2.0, "cpu": 2.0})
    monkeypatch.setattr(sparse_launch, "FEWEST_TILES", 1)
    monkeypatch.setattr(sparse_launch, "EVEN", 10**9)
    parts, real = [], sparse_launch.fold_kernel

    class Counting:
        def __getitem__(self, grid):
            def launch(**given):
                parts.append(given["p_first_part"][-1].item())
                assert given["p_parts"].shape[0] >= 128 * parts[-1]
                real[grid](**given)

            return launch

    monkeypatch.setattr(sparse_launch, "fold_kernel", Counting())
    return parts


OPTIONS = [
    {},
    {"softcap": 5.0, "scale": 1.5},
    {"g": False},
    {"memory_mib": 0.1},  # of two parts
]


@pytest.mark.parametrize(
    ("options", "bias"), [*((options, True) for options in OPTIONS), ({}, False)], ids=str
)
def test_divided_blocks_are_exact(options, bias, device, finest):
    sixteen = torch.float16 if device.type == "cpu" else torch.bfloat16
    for dtype in (torch.float32, sixteen):
        h, w, b, target = head(700, 300, 12, dtype, device)
        tensors = {"hidden": h, "weight": w} | ({"bias": b} if bias else {})
        exact = {k: x.double() for k, x in tensors.items()}
        assert_all_close_as_plain(
            run(linear_logprob, tensors, target, tail_eps=1e-30, backend="triton", **options),
            run(reference.linear_logprob, exact, target, **options),
            run(reference.linear_logprob, tensors, target, **options),
            factor=5,  # float32 logits of gathered rows come from a product of another shape
        )
    room = int(options.get("memory_mib", 256) * 2**17) // (128 * 12 * 4)
    assert finest and all(1 < n <= room for n in finest)


@pytest.mark.parametrize("given", [{}, {"softcap": 5.0}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("few", [0, 701])
def test_tiles_of_both_heights(few, given, device, monkeypatch):
    """64 rows in small batches and beside a softcap, else 128; 128 for `deterministic` at any N."""
    from riskpo_kernels.kernels import sparse_blocks
    from riskpo_kernels.lm_head import sparse_triton

    heights, launch = set(), sparse_triton._launch_dz
    monkeypatch.setattr(sparse_blocks, "FEW_ROWS", few)
    monkeypatch.setattr(block_selection, "DENSE_SHARE", {"cuda": 2.0, "cpu": 2.0})
    monkeypatch.setattr(
        sparse_triton, "_launch_dz", lambda *x: (heights.add(x[2].shape[1]), launch(*x))
    )
    h, w, b, target = head(700, 300, 12, torch.float32, device)
    tensors = {"hidden": h, "weight": w, "bias": b}
    exact = {k: x.double() for k, x in tensors.items()}
    capped = {k: x for k, x in given.items() if k == "softcap"}
    assert_all_close_as_plain(
        run(linear_logprob, tensors, target, tail_eps=1e-30, backend="triton", **given),
        run(reference.linear_logprob, exact, target, **capped),
        run(reference.linear_logprob, tensors, target, **capped),
        factor=5,
    )
    assert heights == {64 if capped or (few and not given) else 128}


@pytest.mark.parametrize("fewest", [1, 10**6])  # blocks divided, and whole
def test_rows_in_pieces_add_up(fewest, device, finest, monkeypatch):
    """Rows that are many come in pieces: what one gives to dW and dbias is added to the others'."""
    from riskpo_kernels.lm_head import backward as head_backward
    from riskpo_kernels.lm_head import sparse_triton as sparse_launch

    monkeypatch.setattr(head_backward, "_piece", lambda head, products, o: 256)
    monkeypatch.setattr(sparse_launch, "FEWEST_TILES", fewest)
    sixteen = torch.float16 if device.type == "cpu" else torch.bfloat16
    for dtype in (torch.float32, sixteen):
        h, w, b, target = head(700, 300, 12, dtype, device)
        tensors = {"hidden": h, "weight": w, "bias": b}
        exact = {k: x.double() for k, x in tensors.items()}
        assert_all_close_as_plain(
            run(linear_logprob, tensors, target, tail_eps=1e-30, backend="triton"),
            run(reference.linear_logprob, exact, target),
            run(reference.linear_logprob, tensors, target),
            factor=5,
        )
    assert bool(finest) == (fewest == 1)


@pytest.mark.parametrize("n", [280, 700])  # into the gradient itself, and through a buffer
def test_common_unit_of_half_precision(n, device, finest, monkeypatch):
    """fp16 products divide the coefficients by their largest: divided sums get it back, once."""
    from riskpo_kernels.lm_head import backward as head_backward

    unit = torch.tensor(2.0**-7, device=device)
    monkeypatch.setattr(head_backward, "_unit", lambda up, products: unit)
    h, w, b, target = head(n, 300, 12, torch.float16, device)
    tensors = {"hidden": h, "weight": w, "bias": b}
    exact = {k: x.double() for k, x in tensors.items()}
    assert_all_close_as_plain(
        run(linear_logprob, tensors, target, tail_eps=1e-30, backend="triton"),
        run(reference.linear_logprob, exact, target),
        run(reference.linear_logprob, tensors, target),
        factor=5,
    )
    assert finest


def test_the_same_twice_and_the_same_work(device, finest, monkeypatch):
    """In an order of their own, whatever the programs' order was; no product is computed twice."""
    from riskpo_kernels.lm_head import sparse_triton as sparse_launch

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    h, w, b, target = head(700, 300, 12, dtype, device)
    found, units = [], []
    for fewest in (1, 1, 10**9):
        monkeypatch.setattr(sparse_launch, "FEWEST_TILES", fewest)
        x = w.clone().requires_grad_()
        with work.counting() as done:
            out = linear_logprob(h, x, target, bias=b, tail_eps=1e-30, backend="triton")
            out.logprob.sum().backward()
        found.append(x.grad)
        units.append(done.multiply_adds)
    assert len(finest) == 2, "the third was not to be divided"
    assert torch.equal(found[0], found[1]) and units[0] == units[1] == units[2]


@pytest.fixture
def launches(monkeypatch):
    """Whether dH was launched with atomics, and the columns of its parts."""
    from riskpo_kernels.lm_head import sparse_triton as sparse_launch

    found, real = [], sparse_launch.dh_kernel

    class Recording:
        def __getitem__(self, grid):
            return lambda **given: (
                found.append((given["ATOMIC"], given["stride_dh"])) or real[grid](**given)
            )

    monkeypatch.setattr(sparse_launch, "dh_kernel", Recording())
    monkeypatch.setattr(block_selection, "DENSE_SHARE", {"cuda": 2.0, "cpu": 2.0})
    return found


@pytest.mark.parametrize(  # all columns at once, 256, 128
    ("memory_mib", "options"), [(256.0, {"softcap": 5.0}), (1.0, {}), (0.5, {})], ids=str
)
def test_dh_in_the_order_of_blocks(memory_mib, options, device, launches):
    """deterministic=True: no atomics; rows of no pair, of one and of all blocks."""
    sixteen = torch.float16 if device.type == "cpu" else torch.bfloat16
    for dtype in (torch.float32, sixteen):
        h, w, b, target = head(150, 300, 300, dtype, device)
        h *= 0.1
        target[::4] = -100
        tensors = {"hidden": h, "weight": w, "bias": b}
        exact = {k: x.double() for k, x in tensors.items()}
        more = {"deterministic": True, "memory_mib": memory_mib, "backend": "triton"}
        assert_all_close_as_plain(
            run(linear_logprob, tensors, target, tail_eps=1e-30, **more, **options),
            run(reference.linear_logprob, exact, target, **options),
            run(reference.linear_logprob, tensors, target, **options),
            factor=5,
        )
    assert launches and not any(atomic for atomic, _ in launches)
    most = {256.0: 384, 1.0: 256 if device.type == "cpu" else 128, 0.5: 128}[memory_mib]
    assert max(columns for _, columns in launches) == most


@pytest.mark.parametrize("parts", [0, 1, 5, 40, 10**6])
def test_jobs(parts):
    """Every tile is in one job, none longer than it may be; there is room for the parts."""
    from riskpo_kernels.lm_head.sparse_triton import jobs_of, longest_job, most_parts

    for tiles in ([3, 700, 0, 64, 0, 0, 65, 1, 400, 0], [64], [1] * 30, [64] * 300, [17] * 9):
        total, each = sum(tiles), torch.tensor(tiles)
        most = longest_job(total, len(tiles), 24, 132, parts)
        job_block, first_job, first_part = (x.tolist() for x in jobs_of(each, total, most))
        covered, divided = [0] * len(tiles), set()
        for job, block in enumerate(job_block):
            if block == len(tiles):  # beyond the last job
                assert job >= first_job[-1]
                continue
            n = min(most, tiles[block] - (job - first_job[block]) * most)
            covered[block] += n
            assert 0 < n <= most
            divided |= {block} if n < tiles[block] else set()
        assert covered == tiles and len(job_block) >= first_job[-1]
        found = {b for b in range(len(tiles)) if first_part[b + 1] > first_part[b]}
        assert found == divided
        assert first_part[-1] <= most_parts(total, len(tiles), most) <= parts
    assert longest_job(64, 1, 24, 132, parts) >= (16 if parts >= 4 else 64)
    assert longest_job(64 * 1200, 1200, 24, 132, 10**6) > 64, "nothing is uneven"
