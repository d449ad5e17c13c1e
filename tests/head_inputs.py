"""Inputs and runners for the log-prob ops: peaked rows, planted targets, arbitrary upstreams."""

import torch


def head(n, vocab, width, dtype, device, *, bias=True, sharpness=3.0, seed=0):
    """hidden [n, width], weight, bias (or None), target: about half of the targets are likely.

    Hidden states lean towards the row of the head that they are to predict, so that the softmax
    is neither flat nor one-hot; the other half of the targets is drawn at random.
    """
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=g)
    likely = torch.randint(vocab, (n,), generator=g)
    other = torch.randint(vocab, (n,), generator=g)
    lean = torch.rand(n, 1, generator=g) * 2 * sharpness / width**0.5
    hidden = torch.randn(n, width, generator=g) * 0.7 + lean * weight[likely]
    target = torch.where(torch.rand(n, generator=g) < 0.5, likely, other)
    b = torch.randn(vocab, generator=g).to(device, dtype) if bias else None
    return hidden.to(device, dtype), weight.to(device, dtype), b, target.to(device)


def upstream(shape, device, seed=1):
    """Coefficients of both signs for logprob and entropy."""
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(shape, generator=g, dtype=torch.float64)
    e = torch.randn(shape, generator=g, dtype=torch.float64)
    return c.to(device), e.to(device)


def run(op, tensors, target, *, c=True, g=True, e=True, columns=True, **options):
    """Results and gradients of `op(*tensors, target, **options)` by name.

    tensors: dict of differentiable inputs; "bias" is passed by keyword. c, g, e: which upstream
    gradients are sent, of logprob, entropy and lse. columns: dW and dbias are split into rows of
    targets and the rest, so that neither hides the other.
    """
    leaves = {k: v.detach().clone().requires_grad_() for k, v in tensors.items() if v is not None}
    positional = [v for k, v in leaves.items() if k != "bias"]
    keywords = {"bias": leaves["bias"]} if "bias" in leaves else {}
    out = op(*positional, target, return_entropy=True, **keywords, **options)
    cs, gs = upstream(out.logprob.shape, out.logprob.device)
    total = (out.logprob.double() * cs).sum() * c + (out.entropy.double() * gs).sum() * g
    total = total + (out.lse.double() * upstream(out.lse.shape, cs.device, seed=2)[0]).sum() * e
    total.backward()
    results = {"logprob": out.logprob, "entropy": out.entropy, "lse": out.lse}
    for name, leaf in leaves.items():
        results["d" + name] = leaf.grad
    return split_columns(results, target) if columns else results


def split_columns(results, target):
    """dweight and dbias apart for target rows of the head and the others; dlogits likewise."""
    out = dict(results)
    if "dweight" in out:
        taken = torch.zeros(out["dweight"].shape[0], dtype=torch.bool, device=target.device)
        taken[target[target >= 0].long()] = True
        for name in ("dweight", "dbias"):
            if name in out:
                grad = out.pop(name)
                out[name + " (targets)"], out[name + " (others)"] = grad[taken], grad[~taken]
    if "dlogits" in out:
        grad = out.pop("dlogits").flatten(0, -2)
        flat = target.reshape(-1)
        rows = torch.arange(flat.numel(), device=flat.device)[flat >= 0]
        out["dlogits (targets)"] = grad[rows, flat[rows].long()]
        rest = grad.clone()
        rest[rows, flat[rows].long()] = 0
        out["dlogits (others)"] = rest
    return out
