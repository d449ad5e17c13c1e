"""What the arguments of an op may be, and which backend runs it.

Every error says what came, what was expected, what to do.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Any, NamedTuple, NoReturn

import torch

BACKENDS = ("auto", "triton", "torch", "reference")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
log = logging.getLogger("riskpo_kernels")


def reject(op: str, came: str, expected: str, todo: str) -> NoReturn:
    """Raise the one kind of error a caller's mistake gets."""
    raise ValueError(f"{op}: got {came}; expected {expected}. {todo}")


def describe(x: object) -> str:
    """A tensor as `bfloat16[4, 7] on cuda:0`; anything else as `type value`."""
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def check_float(op: str, name: str, x: object) -> None:
    """`x` is a floating-point tensor."""
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        reject(op, f"{name} = {describe(x)}", "a floating-point tensor", f"Convert {name} first.")


def check_constant(op: str, **tensors: torch.Tensor | None) -> None:
    """None of the tensors that are given wants a gradient, for the op has none to give."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            todo = f"Pass {name}.detach(): no gradient flows into it."
            reject(op, f"{name} that requires grad", "a constant", todo)


def check_device(op: str, **tensors: torch.Tensor | None) -> None:
    """What is given are tensors, all on one device."""
    for name, x in tensors.items():
        if x is not None and not isinstance(x, torch.Tensor):
            reject(op, f"{name} = {describe(x)}", "a tensor", f"Convert {name} first.")
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        came = ", ".join(f"{name} on {device}" for name, device in devices.items())
        reject(op, came, "every tensor on one device", "Move them with .to(device).")


def check_shape(op: str, name: str, x: torch.Tensor, shape: tuple[int, ...], why: str) -> None:
    """`x` is a tensor of exactly `shape`; `why` names the tensor that fixes it."""
    if not isinstance(x, torch.Tensor):
        reject(op, f"{name} = {describe(x)}", "a tensor", f"Convert {name} first.")
    if tuple(x.shape) != tuple(shape):
        reject(
            op,
            f"{name} of shape {list(x.shape)}",
            f"{list(shape)}, {why}",
            f"Reshape or slice {name} to match.",
        )


def check_choice(op: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """`value` is one of a few words."""
    if value not in choices:
        reject(op, f"{name}={value!r}", f"one of {list(choices)}", "Check the spelling.")


def check_flags(op: str, **flags: object) -> None:
    """Each is True or False: of another value Python would make one of them in silence."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            reject(op, f"{name}={value!r}", "True or False", f"Set {name} accordingly.")


def check_ignore_index(op: str, value: object) -> None:
    """None or a token id."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        reject(op, f"ignore_index={value!r}", "an int or None", "-100 is usual.")


def check_positive(op: str, name: str, value: float, *, zero_ok: bool = False) -> None:
    """A host number that has to be finite and above zero (or not below it)."""
    bound = "at least 0" if zero_ok else "above 0"
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not (0 <= value if zero_ok else 0 < value) or value == float("inf"):
        todo = f"Set {name} accordingly." if fits else f"Pass float({name})."
        reject(op, f"{name}={value!r}", f"a finite number {bound}", todo)


def constant(x: Any) -> Any:
    """An option's number as a constant of the graph that is being made; x itself outside of one.

    From its second value on torch.compile hands a Python float on as a symbol, and Inductor gives
    an operator's float argument the value of an earlier call. A constant is guarded instead:
    another value makes another graph.
    """
    if not torch.compiler.is_compiling() or not isinstance(x, (int, float)):
        return x
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # slow to import

    return guard_scalar(x)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels cannot run there, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32 and the input is float64"
    if device.type == "cuda":
        capability = _capability(device.index if device.index is not None else 0)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        return None
    if not _interpreting():
        return f"device {device.type} is not CUDA and TRITON_INTERPRET=1 is not set"
    if dtype == torch.bfloat16:
        return "the Triton interpreter computes wrong bfloat16 products"
    return None


def choose(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve `backend` for `op`; an explicit one that cannot run raises ValueError."""
    check_choice(op, "backend", backend, BACKENDS)
    if backend in ("torch", "reference"):
        return backend
    obstacle = why_not_triton(device, dtype)
    if backend == "triton":
        if obstacle is not None:
            reject(op, "backend='triton'", "a machine where it can run", f"Here {obstacle}.")
        return "triton"
    choice = auto_choice(obstacle, device)
    _log_once(op, device.type, *choice)
    return choice[0]


def auto_choice(obstacle: str | None, device: torch.device) -> tuple[str, str]:
    if obstacle is not None:
        return "torch", obstacle
    if device.type != "cuda":
        return "torch", "the Triton interpreter is for tests; the torch backend is faster on a CPU"
    return "triton", "CUDA device with compute capability 8.0 or newer"


@functools.cache
def _log_once(op: str, device: str, backend: str, reason: str) -> None:
    log.info("%s on %s: backend %s (%s)", op, device, backend, reason)


class LiveRows(NamedTuple):
    """The rows that are not ignored: their index (None: all of them) and their targets [n]."""

    keep: torch.Tensor | None
    target: torch.Tensor


def check_weight(op: str, weight: torch.Tensor, *, sharded_ok: bool) -> None:
    """A whole head, not one rank's part of it."""
    check_float(op, "weight", weight)
    if hasattr(weight, "full_tensor"):
        reject(
            op,
            "weight as a DTensor",
            "this rank's plain tensor",
            "Pass riskpo_kernels.full_weight(weight), which is weight.full_tensor() with the right "
            "gradient, once per step; or call the op inside the module's forward, where FSDP has "
            "gathered it; or pass weight.to_local() and vocab_group.",
        )
    if weight.numel() == 0 and not sharded_ok:
        reject(
            op,
            f"an empty weight {list(weight.shape)}",
            "the whole [V, D] head",
            "A sharded parameter is empty outside its gather: use FSDP's forward, or "
            "riskpo_kernels.gathered_weight (for ZeRO-3, deepspeed.zero.GatheredParameters), or "
            "pass vocab_group for a vocabulary shard.",
        )
    if weight.dim() != 2:
        reject(op, f"weight = {describe(weight)}", "[V, D]", "Pass the head's weight matrix.")


def check_head(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    sharded_ok: bool,
) -> None:
    """hidden [..., D], weight [V, D], target [...] or [..., K], bias [V]."""
    check_float(op, "hidden", hidden)
    check_weight(op, weight, sharded_ok=sharded_ok)
    check_device(op, hidden=hidden, weight=weight, target=target, bias=bias)
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        looks = hidden.dim() and hidden.shape[-1] == weight.shape[0]
        todo = (
            "These look like logits: use logits_logprob."
            if looks
            else "Pass the hidden states that the head multiplies."
        )
        came = f"hidden {list(hidden.shape)} with weight {list(weight.shape)}"
        reject(op, came, f"hidden of width {weight.shape[1]}", todo)
    several = target.dim() == hidden.dim() and target.shape[-1] > 0
    one = target[..., 0] if several else target
    check_shape(op, "target", one, tuple(hidden.shape[:-1]), "hidden without its last dimension")
    pair = hidden.dtype, weight.dtype
    if pair[0] != pair[1] and not (pair[0] in SIXTEEN_BIT and pair[1] == torch.float32):
        reject(
            op,
            f"hidden {pair[0]} with weight {pair[1]}",
            "equal dtypes, or 16-bit hidden with a float32 weight",
            "Cast one of them.",
        )
    if bias is not None:
        check_float(op, "bias", bias)
        check_shape(op, "bias", bias, (weight.shape[0],), "one per row of weight")
        if bias.dtype not in (weight.dtype, torch.float32):
            reject(op, f"bias {bias.dtype}", f"{weight.dtype} or float32", "Cast the bias.")


def check_options(
    op: str,
    rows: tuple[int, ...],
    device: torch.device,
    *,
    temperature: float | torch.Tensor,
    scale: float = 1.0,
    softcap: float | None,
    memory_mib: float = 1.0,
    tail_eps: float | None = None,
) -> None:
    """The numbers that shape the logits."""
    if isinstance(temperature, torch.Tensor):
        check_float(op, "temperature", temperature)
        check_shape(op, "temperature", temperature, rows, "one per target")
        if temperature.device != device:
            reject(op, f"temperature on {temperature.device}", f"{device}", "Move it.")
        check_constant(op, temperature=temperature)
    else:
        check_positive(op, "temperature", temperature)
    if not isinstance(scale, (int, float)) or scale != scale or scale in (0, float("inf")):
        reject(op, f"scale={scale!r}", "a finite number other than 0", "Set scale accordingly.")
    if softcap is not None:
        check_positive(op, "softcap", softcap)
    check_positive(op, "memory_mib", memory_mib)
    if tail_eps is not None:
        check_positive(op, "tail_eps", tail_eps, zero_ok=True)


def live_rows(
    op: str,
    target: torch.Tensor,
    vocab: int,
    ignore_index: int | None,
    temperature: float | torch.Tensor = 1.0,
) -> LiveRows:
    """Check flat targets [N] and find the rows to compute.

    On a GPU this is the forward's one host synchronisation: the number of live rows is the shape
    of the products, and the same transfer brings the verdict on the values. ignore_index=None
    says that every row lives: nothing is looked at, and nothing is waited for.
    """
    if target.is_floating_point() or target.dtype == torch.bool or target.is_complex():
        reject(op, f"target = {describe(target)}", "integer token ids", "Convert with .long().")
    target = target.long()
    if target.numel() == 0 or ignore_index is None:
        return LiveRows(None, target)
    live = target != ignore_index
    bad = live & ((target < 0) | (target >= vocab))
    low_high = target.masked_fill(~live, 0).aminmax()
    numbers = [bad.sum(), live.sum(), low_high.min, low_high.max]
    if isinstance(temperature, torch.Tensor):
        numbers.append((live & ~(temperature.reshape(-1) > 0)).sum())
    n_live = judge(op, torch.stack(numbers).tolist(), vocab, ignore_index)
    if n_live == target.numel():
        return LiveRows(None, target)
    index = live.nonzero()[:, 0] if target.device.type == "cpu" else _nonzero(live, n_live)
    return LiveRows(index, target[index])


def judge(op: str, numbers: list[int], vocab: int, ignore_index: int) -> int:
    """The live rows, where nothing is wrong with what was counted: targets outside the vocabulary,
    live rows, their lowest and highest target, and perhaps temperatures not above 0."""
    n_bad, n_live, low, high, *cold = numbers
    if n_bad:
        reject(
            op,
            f"{n_bad} targets outside the vocabulary (ids from {low} to {high})",
            f"ids in [0, {vocab}) or ignore_index={ignore_index}",
            "Mask padding with ignore_index.",
        )
    if cold and cold[0]:
        reject(op, f"{cold[0]} temperatures not above 0", "all above 0", "Greedy rows have none.")
    return n_live


def _nonzero(live: torch.Tensor, n: int) -> torch.Tensor:
    """nonzero of known size: no second synchronisation."""
    return torch.nonzero_static(live, size=n)[:, 0]
