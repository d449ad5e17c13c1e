"""The Triton kernels. Importing this package's modules needs Triton; nothing else here does.

Every module lists what it can launch in `compile_configurations()`, as tuples (name, function,
signature, constexprs, num_warps, num_stages, further launch options): tools/compile_check.py
compiles each ahead of time.
"""

from typing import Any

Configuration = tuple[str, Any, dict[str, str], dict[str, Any], int, int, dict[str, Any]]
FLOAT_SCALARS = ("scale", "softcap", "temperature")


def signature_of(
    kernel: Any, types: dict[str, str], given: dict[str, bool], constexprs: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any]]:
    """(signature, constexprs) of a launch: pointers (p_...) are fp32 unless `types` says otherwise
    and None where `given` says so; other arguments are sizes, or one of FLOAT_SCALARS."""
    signature, constexprs = {}, dict(constexprs)
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif not given.get(argument, True):
            signature[argument], constexprs[argument] = "constexpr", None
        elif argument.startswith("p_"):
            signature[argument] = "*" + types.get(argument, "fp32")
        else:
            signature[argument] = "fp32" if argument in FLOAT_SCALARS else "i32"
    return signature, constexprs
