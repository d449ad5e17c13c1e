"""clipped_surrogate from inside: checks, operator, one pass in PyTorch."""
