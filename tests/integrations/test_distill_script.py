"""examples/distill.py runs as it stands on two models of different widths."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.toy import save_byte_model

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "distill.py"


def distances(monkeypatch, capsys, student, teacher):
    """What the script prints."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(student), str(teacher)])
    runpy.run_path(str(SCRIPT))
    return [float(x) for x in re.findall(r"step \d: ([\d.]+) nats", capsys.readouterr().out)]


def test_fifteen_lines_run_on_two_models(tmp_path, monkeypatch, capsys):
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()[1:]
    assert sum(bool(line) and "import" not in line for line in lines) <= 15
    models = save_byte_model(tmp_path / "a"), save_byte_model(tmp_path / "b", hidden_size=64)
    found = distances(monkeypatch, capsys, *models)
    assert len(found) == 4 and min(found) > 0


@pytest.mark.timeout(600)
def test_a_small_model_learns_from_a_pretrained_one(real_model, tmp_path, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "student")
    found = distances(monkeypatch, capsys, tmp_path / "student", real_model)
    assert len(found) == 4 and min(found) > 1
