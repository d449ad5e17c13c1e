"""Sampling: transformers or vLLM, and one step's batch of responses."""
