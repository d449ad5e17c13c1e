"""The Triton kernels. Importing this package's modules needs Triton; nothing else here does."""
