"""A reward of its own module, which loads no PyTorch: verifier processes import it."""


def odd_length(text: str, question: object) -> float:
    """A reward that an untrained model earns about half of the time."""
    return float(len(text) % 2)
