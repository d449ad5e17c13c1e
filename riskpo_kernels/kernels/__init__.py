"""The Triton kernels. Importing this package's modules needs Triton; nothing else here does.

Every module lists what it can launch in `compile_configurations()`, as tuples (name, function,
signature, constexprs, num_warps, num_stages, further launch options): tools/compile_check.py
compiles each ahead of time.
"""

from typing import Any

Configuration = tuple[str, Any, dict[str, str], dict[str, Any], int, int, dict[str, Any]]
