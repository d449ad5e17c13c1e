"""Other libraries' heads, each optional: what to call, what it costs, and why it cannot run here.

Units count products of N D V multiply-adds times 2: logits 2, dH 2, dW 2, recomputed logits 2.
Every peer runs at temperature 1 (folded into the hidden states) and gets contiguous upstream
gradients, and of masked rows none. A peer whose forward already makes gradients is only timed
forward + backward. logits_in and sums_in (see Provider) are as read in the versions of
tools/gpu_session.sh.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from riskpo.doctor.libraries import LIGER, TRL, VERL, liger_op, torch_op, trl_op, verl_op

LogProbs = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Head:
    """call(hidden, weight, target, entropy) -> (logprob, entropy or None), or with
    per_token=False call(hidden, weight, target) -> mean negative log-prob."""

    call: Callable[..., Any]
    why_not: Callable[[torch.device, torch.dtype], str | None]
    units: tuple[float, float]  # forward, backward
    entropy: bool = True
    per_token: bool = True
    logits_in: str = "inputs"
    sums_in: str = "inputs"
    slow_start: bool = False
    materialises: float = 0.0  # bytes per logit at the peak, for those that keep [N, V]
    backend: Callable[[torch.device], str] = lambda device: "torch"


def find(module: str, name: str) -> tuple[Any, str | None]:
    """(attribute, None), or (None, the reason why it is not there)."""
    try:
        return getattr(importlib.import_module(module), name), None
    except Exception as error:  # a package may fail in any way at import: that is its reason
        text = str(error).strip().splitlines() or [""]
        return None, f"{module}.{name}: {type(error).__name__}: {text[0][:120]}"


def run_alone(package: str, *parents: str) -> None:
    """Lets single modules of an installed package be imported where the package itself cannot be,
    for lack of what its __init__ files ask for: those of `parents` are not run. For a process that
    does nothing else with the package."""
    try:
        importlib.import_module(package)
        return
    except Exception:
        spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return
    for name in [n for n in sys.modules if n.startswith(f"{package}.")]:
        del sys.modules[name]
    for name in (package, *parents):
        inside = name.split(".")[1:]
        stub = types.ModuleType(name)
        stub.__path__ = [os.path.join(p, *inside) for p in spec.submodule_search_locations]
        sys.modules[name] = stub


@functools.cache
def _found(module: str, name: str) -> tuple[Any, str | None]:
    return find(module, name)


CUTE = "CuTe kernels need 100 MB of wheels: tools/gpu_session.sh --fetch cute"


def _needs(
    module: str, name: str, *, cuda: bool = False, sixteen_bit: bool = False, hint: str = ""
):
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        if cuda and device.type != "cuda":
            return "needs a CUDA device"
        if sixteen_bit and dtype == torch.float32:
            return "needs 16-bit inputs"
        reason = _found(module, name)[1]
        return f"{reason} ({hint})" if reason and hint else reason

    return why_not


def _nowhere_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def plain(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, entropy: bool) -> LogProbs:
    """What trainers write: logits in the input dtype, log-softmax in float32."""
    logp = torch.log_softmax((h @ w.T).float(), -1)
    h_ = -(logp.exp() * logp).sum(-1) if entropy else None
    return logp.gather(-1, t[:, None])[:, 0], h_


def _compiled(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, entropy: bool) -> LogProbs:
    return _compiled_plain()(h, w, t, entropy)


@functools.cache
def _compiled_plain() -> Callable[..., LogProbs]:
    return torch.compile(plain, dynamic=False)


def _no_compiler(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or any(map(shutil.which, ("c++", "g++", "clang++"))):
        return None
    return "torch.compile needs a C++ compiler on a CPU"


def _torch_lce_mean(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(h, w, t, options=options)


def _at_1(op: Callable[..., LogProbs]) -> Callable[..., LogProbs]:
    """One of the doctor's calls, as a Head's."""
    return lambda h, w, t, entropy: op(h, w, t, 1.0, entropy)


def _no_torch_lce(device: torch.device, dtype: torch.dtype) -> str | None:
    if hasattr(functional, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)"


LIGER_CE = ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
CCE = ("cut_cross_entropy", "linear_cross_entropy")
QUACK = ("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
FLA = ("fla.modules.fused_linear_cross_entropy", "fused_linear_cross_entropy_loss")
VERL_TRITON = ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")


def _liger_backend(device: torch.device) -> str:
    """Liger picks its implementation by device and falls back to torch in silence."""
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    resolve, reason = _found(module, "_resolve_implementation")
    if reason is not None:
        return "unknown"
    return "torch" if "Fallback" in resolve(device).__name__ else resolve(device).__name__


def _no_liger(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _found(*LIGER)[1]
    if reason is None and device.type == "cuda":
        try:
            _liger_backend(device)
        except ImportError as error:
            return f"its kernel for this GPU does not import: {error} ({CUTE})"
    return reason


def _liger_mean(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return _found(*LIGER_CE)[0]()(w, h, t)


def _cce(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, entropy: bool) -> LogProbs:
    return -_found(*CCE)[0](h, w, t, reduction="none", impl="cce"), None


def _cce_exact(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, entropy: bool) -> LogProbs:
    op = _found(*CCE)[0]
    if "accum_e_fp32" in inspect.signature(op).parameters:  # newer than the PyPI version
        return -op(h, w, t, reduction="none", impl="cce_exact"), None
    return -op(h, w, t, reduction="none", impl="cce", filter_eps=None), None


def _quack(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return _found(*QUACK)[0](h, w, t, reduction="mean")


def _fla(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return _found(*FLA)[0](h, t, w)


def _verl_triton(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, entropy: bool) -> LogProbs:
    return _found(*VERL_TRITON)[0](h, w, t, 1.0, "none")


def _name(text: str) -> Callable[[torch.device], str]:
    return lambda device: text


def _mean(call: Callable[..., Any], why_not: Callable[..., str | None], **facts: Any) -> Head:
    return Head(call, why_not, (2, 4), entropy=False, per_token=False, **facts)


ONCE = "one product"  # over all tokens: nothing is summed outside of it
_CCE = Head(  # units: at most, it drops tiles
    _cce,
    _needs(*CCE, cuda=True),
    (2, 6),
    entropy=False,
    logits_in="float32",
    backend=_name("triton"),
)
HEADS: dict[str, Head] = {
    "plain": Head(plain, _nowhere_missing, (2, 4), sums_in=ONCE, materialises=12),
    "plain, torch.compile": Head(
        _compiled,
        _no_compiler,
        (2, 4),
        sums_in=ONCE,
        slow_start=True,
        materialises=6,
        backend=_name("inductor"),
    ),
    "TRL chunked log-prob": Head(
        _at_1(trl_op),
        _needs(*TRL),
        (2, 6),
        sums_in="float32",
        backend=lambda device: "triton" if device.type == "cuda" else "torch",
    ),
    "F.linear_cross_entropy": Head(
        _at_1(torch_op), _no_torch_lce, (2, 6), entropy=False, logits_in="float32"
    ),
    # dtypes of its torch path; its kernel for Hopper keeps the logits in registers
    "Liger fused scaled CE": Head(_at_1(liger_op), _no_liger, (2, 6), backend=_liger_backend),
    "Cut Cross-Entropy": _CCE,
    "Cut Cross-Entropy, exact": replace(_CCE, call=_cce_exact),
    "verl Triton": Head(
        _verl_triton,
        _needs(*VERL_TRITON, cuda=True),
        (2, 6),
        logits_in="float32",
        sums_in=ONCE,
        backend=_name("triton"),
    ),
    "verl torch": Head(_at_1(verl_op), _needs(*VERL), (2, 6)),
    "F.linear_cross_entropy, mean": _mean(_torch_lce_mean, _no_torch_lce, logits_in="float32"),
    "Liger fused CE, mean": _mean(
        _liger_mean, _needs(*LIGER_CE, cuda=True), backend=_name("triton")
    ),
    "QuACK chunked CE, mean": _mean(
        _quack,
        _needs(*QUACK, cuda=True, sixteen_bit=True, hint=CUTE),
        sums_in="float32",
        backend=_name("cute"),
    ),
    "fla fused CE, mean": _mean(
        _fla, _needs(*FLA, cuda=True), sums_in="float32", backend=_name("triton")
    ),
}
