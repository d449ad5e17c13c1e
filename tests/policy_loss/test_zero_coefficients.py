"""Rows without a coefficient leave the backward; whatever gives them one keeps them (trap 34)."""

import pytest
import torch

from riskpo_kernels import reference, riskpo_loss
from riskpo_kernels.core import softmax
from riskpo_kernels.core.matmul import counting
from tests.compare import assert_close_as_plain
from tests.conftest import has_triton
from tests.head_inputs import head


@pytest.mark.usefixtures("recomputed")
@pytest.mark.parametrize("terms", [{}, {"entropy_coef": 0.02}, {"kl_coef": 0.1}], ids=str)
def test_skipped_rows_change_no_gradient(terms, device):
    """Half of the sequences have no advantage: gradients are the reference's, which skips nothing;
    an entropy or KL term gives every row a gradient, and then none is skipped."""
    h, w, _, target = head(40, 300, 16, torch.float32, device, bias=False)
    cu = torch.arange(0, 41, 10, dtype=torch.int32, device=device)
    advantage = torch.tensor([0.0, -1.0, 0.0, -0.5], device=device)
    old = reference.linear_logprob(h, w, target).logprob
    options = {"cu_seqlens": cu, "clip_low": 0.5, "clip_high": 0.5, **terms}
    ref = old + 0.1 * torch.randn(40, device=device) if "kl_coef" in terms else None

    def gradients(op, dtype, **more):
        hh, ww = (x.to(dtype).requires_grad_() for x in (h.clone(), w.clone()))
        given = (old.to(dtype), advantage.to(dtype))
        reference_policy = None if ref is None else ref.to(dtype)
        with counting() as work:
            op(hh, ww, target, *given, ref_logprob=reference_policy, **options, **more)[
                0
            ].backward()
        return hh.grad, ww.grad, 2 * work.multiply_adds / (40 * 300 * 16)

    truth = gradients(reference.riskpo_loss, torch.float64)
    plain = gradients(reference.riskpo_loss, torch.float32)
    got = gradients(riskpo_loss, torch.float32, backend="torch")
    for i, name in enumerate(("dH", "dW")):
        assert_close_as_plain(name, got[i], truth[i], plain[i])
    silent = torch.arange(40, device=device) // 10 % 2 == 0
    assert (got[0][silent] == 0).all() == (not terms)
    assert got[2] == pytest.approx(8.0 if terms else 5.0), "units executed"


# per sequence: what happens to it, its advantage, its ratio (old log-probs are made to give it)
FATES = {
    "clipped above": (1.0, 1.5),
    "clipped below": (-1.0, 0.5),
    "dual clip": (-1.0, 4.0),
    "no advantage": (0.0, 1.0),
    "rejected": (1.0, 1.0),
    "masked": (-1.0, 1.0),
    "sent": (-1.0, 1.0),
    "sent, ratio above the bound": (-1.0, 1.5),
    "sent, ratio below the bound": (1.0, 0.5),
}
SENT = [name.startswith("sent") for name in FATES]
WAYS = {"dense": 0.0, "sparse": 1e-30}  # a threshold that drops no block
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason=""))]


def batch_of_fates(ratio, length, vocab, width, device):
    """Inputs of riskpo_loss: a sequence for each fate; for the token ratio every other token of a
    clipped sequence keeps a ratio of 1, and so its coefficient. Also which rows are sent."""
    n, fates = len(FATES) * length, list(FATES)
    h, w, _, target = head(n, vocab, width, torch.float32, device, bias=False)
    segment = torch.arange(len(fates), device=device).repeat_interleave(length)
    advantage, wanted = torch.tensor(list(FATES.values()), device=device).T
    log_ratio = wanted.log()[segment]
    sent = torch.tensor(SENT, device=device)[segment]
    if ratio == "token":
        every_other = torch.arange(n, device=device) % 2 == 0
        log_ratio = torch.where(every_other, log_ratio, 0.0)
        cut = torch.tensor(["clip" in name for name in FATES], device=device)[segment]
        sent = sent | (cut & ~every_other)
    given = {
        "old_logprob": reference.linear_logprob(h, w, target).logprob - log_ratio,
        "advantage": advantage,
        "correction": torch.tensor([float(x != "rejected") for x in fates], device=device),
        "mask": (segment != fates.index("masked")),
        "cu_seqlens": torch.arange(0, n + 1, length, dtype=torch.int32, device=device),
        "dual_clip": 3.0,
        "ratio": ratio,
    }
    return h, w, target, given, sent


def products_of_forward(n, vocab, width, backend, device):
    """Multiply-adds of the forward; the kernel's tiles are computed whole."""
    if backend == "triton":
        from riskpo_kernels.kernels.head_tile import FORWARDS, forward_on

        on_gpu = device.type == "cuda"
        capability = torch.cuda.get_device_capability(device) if on_gpu else (9, 0)
        tile = FORWARDS[forward_on(capability, capability >= (9, 0))]
        n, vocab = -(-n // tile.rows) * tile.rows, -(-vocab // tile.columns) * tile.columns
    return n * vocab * width


def products_of_rows(n, vocab, width, way, backend):
    """Multiply-adds of the backward of n rows; the kernels' tiles hold 64 pairs of a block."""
    if way == "sparse" and backend == "triton":
        n = -(-n // 64) * 64
    return 3 * n * vocab * width


@pytest.mark.usefixtures("recomputed")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_clipped_and_rejected_rows_enter_no_product(monkeypatch, ratio, way, backend, device):
    """Clipped on either side, dual-clipped, rejected, without advantage: forward only. Masked:
    not even that. The gradients are the reference's, which leaves nothing out."""
    monkeypatch.setattr(softmax, "DENSE_SHARE", dict.fromkeys(("cuda", "cpu"), 2.0))
    length, vocab, width = 40, 256, 8  # another number of tiles than if every row went
    h, w, target, given, sent = batch_of_fates(ratio, length, vocab, width, device)

    def gradients(op, dtype, **more):
        hh, ww = (x.to(dtype).requires_grad_() for x in (h.clone(), w.clone()))
        with counting() as work:
            op(hh, ww, target, **given, **more).loss.backward()
        return hh.grad, ww.grad, work.multiply_adds

    truth = gradients(reference.riskpo_loss, torch.float64)
    plain = gradients(reference.riskpo_loss, torch.float32)
    got = gradients(riskpo_loss, torch.float32, backend=backend, tail_eps=WAYS[way])
    for i, name in enumerate(("dH", "dW")):
        # float32 logits of gathered rows come from a product of another shape
        assert_close_as_plain(name, got[i], truth[i], plain[i], factor=5)
    assert torch.equal((truth[0] != 0).any(1), sent), "the inputs are not what they are meant to be"
    assert torch.equal((got[0] != 0).any(1), sent)
    live, ran = (len(FATES) - 1) * length, backend
    if device.type == "cuda" and way == "sparse":
        backend = "torch"  # whose loop takes float32 there
    backward = products_of_rows(int(sent.sum()), vocab, width, way, backend)
    forward = products_of_forward(live, vocab, width, ran, device)
    assert got[2] - forward == backward
    assert backward < products_of_rows(live, vocab, width, way, backend), "nothing would show"
