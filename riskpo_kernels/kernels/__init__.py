"""The Triton kernels. Importing this package's modules needs Triton; nothing else here does.

Every module lists what it can launch in `compile_configurations()`: compile_check.py compiles
each ahead of time.
"""

import functools
from typing import Any, NamedTuple

import torch

from riskpo_kernels.core.gradient import RowGradient
from riskpo_kernels.core.softmax import LogitMap


class Configuration(NamedTuple):
    """One launch. options: further ones beside warps and stages; archs: where it can be launched,
    as 10 x compute capability (empty: wherever there is Triton); ragged: sizes that hang on the
    vocabulary are no multiples of 16."""

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    warps: int
    stages: int
    options: dict[str, Any]
    archs: tuple[int, ...] = ()
    ragged: bool = False


def at_most(registers: int | None) -> dict[str, int]:
    """The launch option that bounds a thread's registers; AMD's compiler has none."""
    return {} if registers is None or torch.version.hip else {"maxnreg": registers}


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """NVIDIA's, an AMD GPU has none. The interpreter runs what Hopper would."""
    if torch.version.hip:
        return (0, 0)
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Those of a GPU; in the interpreter few, so that each persistent program has several jobs."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def readable(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x as the kernels read it: of one dtype, columns next to each other."""
    x = x if dtype is None else x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def of_rows(map: LogitMap, up: RowGradient | None = None) -> dict[str, Any]:
    """What a launch says of its rows' logits, and of their gradients. An argument is None where
    there is no such thing, and the kernel is compiled without it."""
    inner, outer, per_row = map.factors()
    given: dict[str, Any] = {"inner": inner, "outer": outer, "p_temperature": per_row}
    return given if up is None else given | {f"p_{k}": x for k, x in up._asdict().items()}


FLOAT_SCALARS = {"inner", "outer", "eps", "cap", "dense_above", "softcap", "temperature"}
FLOAT_SCALARS |= {"q_inner", "q_outer", "log_beta", "log_rest", "rest"}


def configuration(
    name: str,
    kernel: Any,
    types: dict[str, str],
    given: dict[str, bool],
    constexprs: dict[str, Any],
    warps: int,
    stages: int = 3,
    **options: Any,
) -> Configuration:
    """A launch: pointers (p_...) are fp32 unless `types` says otherwise, descriptors (d_...) what
    `types` says, either is None where `given` says so; other arguments are sizes, or one of
    FLOAT_SCALARS."""
    signature, constexprs = {}, dict(constexprs)
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif not given.get(argument, True):
            signature[argument], constexprs[argument] = "constexpr", None
        elif argument.startswith("p_"):
            signature[argument] = "*" + types.get(argument, "fp32")
        elif argument.startswith("d_"):
            signature[argument] = types[argument]
        else:
            signature[argument] = "fp32" if argument in FLOAT_SCALARS else "i32"
    return Configuration(name, kernel, signature, constexprs, warps, stages, options)
