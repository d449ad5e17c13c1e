"""The Triton kernels. Importing this package's modules needs Triton; nothing else here does.

Every module lists what it can launch in `compile_configurations()`, as tuples (name, function,
signature, constexprs, num_warps, num_stages): tools/compile_check.py compiles each ahead of time.
"""
