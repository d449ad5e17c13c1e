"""What the plan needs to know of a model: read from its config, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from riskpo.model.gguf import as_folder, is_gguf

# Published config.json values, for a machine without network or cache.
FIELDS = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
PUBLISHED = {
    "Qwen2.5-1.5B": ("qwen2", 28, 1536, 8960, 12, 2, 151936, True),
    "Qwen2.5-7B": ("qwen2", 28, 3584, 18944, 28, 4, 152064, False),
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, 128256, False),
}
KNOWN: dict[str, dict[str, Any]] = {
    name: dict(zip(FIELDS, values, strict=True)) for name, values in PUBLISHED.items()
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder. `queries` and `keys` are heads times their width."""

    name: str
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    queries: int
    keys: int
    vocab: int
    trainable: int  # parameters that are trained
    tied: bool  # the head is the embedding
    head_learns: bool
    norms_learn: bool  # what a frozen one normalises is not kept for its gradient
    mlp_learns: bool  # nor are the inputs of a frozen product

    @property
    def largest_tensor(self) -> int:
        """Elements of the largest one that is stepped: an embedding or a projection of an MLP."""
        return min(self.hidden * max(self.vocab, self.intermediate), self.trainable)

    @property
    def largest_mlp(self) -> int:
        """Parameters of one layer's gate, up and down projections."""
        return 3 * self.hidden * self.intermediate


def find_shape(name: str) -> ModelShape:
    """The shape of a folder's config, of a name in the hub cache, or of one of KNOWN.

    A name may carry its organisation and its suffix (Qwen/Qwen2.5-7B-Instruct). ValueError lists
    what is known.
    """
    name = as_folder(name)
    known = check_name(name)
    from transformers import AutoConfig

    try:
        if known is not None:
            return shape_of(AutoConfig.for_model(**KNOWN[known]), known)
        return shape_of(AutoConfig.from_pretrained(name, local_files_only=True), name)
    except (OSError, ValueError) as error:
        raise _unknown(name, str(error).strip().partition("\n")[0]) from None


def check_name(name: str) -> str | None:
    """Its key in KNOWN; None where a folder or the hub cache has a config. ValueError otherwise.

    Imports nothing that takes seconds.
    """
    path = Path(name)
    if is_gguf(name) and path.is_file():
        return None
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise _unknown(name, "the folder has no config.json")
        return None
    stem = name.rsplit("/", 1)[-1].removesuffix("-Instruct").lower()
    for known in KNOWN:
        if known.lower() in (stem, stem.removeprefix("meta-")):
            return known
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise _unknown(name, "there is no such folder") from None
    if not isinstance(found, str):
        raise _unknown(name, "it is neither a folder nor in the hub cache")
    return None


def _unknown(name: str, reason: str) -> ValueError:
    return ValueError(
        f"plan: no config for model {name!r} ({reason[:120]}). Give a folder with a config.json, a "
        f"name in the hub cache, or one of {', '.join(KNOWN)}."
    )


def shape_of(config: Any, name: str) -> ModelShape:
    """The shape of a config's model, built on the meta device: exact, and no byte of weight."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return replace(shape_of_model(AutoModelForCausalLM.from_config(config)), name=name)


def shape_of_model(model: Any) -> ModelShape:
    """The shape of a model, frozen parameters told apart; ValueError if it is not dense."""
    from riskpo.model.attention import head_width

    text = model.config.get_text_config()
    missing = [x for x in ("intermediate_size", "num_attention_heads") if not hasattr(text, x)]
    if missing:
        raise ValueError(
            f"plan: got a {type(model).__name__} without {', '.join(missing)}; expected a dense "
            "decoder. The plan knows no other kind."
        )
    keys = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head, learning = (
        model.get_output_embeddings(),
        [p for p in model.parameters() if p.requires_grad],
    )
    return ModelShape(
        name=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        queries=text.num_attention_heads * head_width(text),
        keys=keys * head_width(text),
        vocab=text.vocab_size,
        trainable=sum(p.numel() for p in learning),
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        head_learns=head is None or head.weight.requires_grad,
        norms_learn=any(p.shape == (text.hidden_size,) for p in learning),
        mlp_learns=any(text.intermediate_size in p.shape for p in learning),
    )
