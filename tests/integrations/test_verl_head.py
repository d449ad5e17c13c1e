"""examples/verl/fused_head.patch on the installed verl: its fused head takes linear_logprob."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

verl = pytest.importorskip(
    "verl.trainer.ppo.core_algos", reason="verl does not import here: run make test-hosts"
)
from riskpo.integrations.verl import head  # noqa: E402

PATCH = Path(__file__).resolve().parents[2] / "examples" / "verl" / "fused_head.patch"
FUSED, PATCHED = "verl.utils.experimental.torch_functional", "verl.models.transformers.monkey_patch"


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """The two modules as the patch leaves them."""
    found = {}
    for name in (FUSED, PATCHED):
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8"))
    done = subprocess.run(["git", "apply", PATCH], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in (FUSED, PATCHED):
        path = tmp_path / (name.replace(".", "/") + ".py")
        spec = importlib.util.spec_from_file_location(name, path)
        found[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, found[name])
        found[name].__spec__ = spec
        spec.loader.exec_module(found[name])
    return found


def test_without_the_patch_there_is_no_place_for_it():
    assert not head.register_head()


def test_with_the_patch_the_models_forward_takes_it(upstream, monkeypatch):
    fused = upstream[FUSED]
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend: riskpo"):
        fused.FusedLinearForPPO(impl_backend="riskpo")
    assert head.register_head()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=50, **sizes, **heads))
    monkeypatch.setattr(type(model), "forward", type(model).forward)  # put back afterwards
    ids = torch.randint(2, model.config.vocab_size, (2, 9))
    logits = model(input_ids=ids).logits / 0.7
    upstream[PATCHED].patch_forward_with_backends(
        model, use_fused_kernels=True, fused_kernels_backend="riskpo"
    )
    out = model(input_ids=ids, temperature=0.7, return_dict=True)
    logp = logits.log_softmax(-1)
    want = logp.gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
    torch.testing.assert_close(out.log_probs, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5)
    weight = model.lm_head.weight
    ours = torch.autograd.grad((out.log_probs[:, :-1] + out.entropy[:, :-1]).sum(), weight)[0]
    entropy = -(logp.exp() * logp).sum(-1)
    theirs = torch.autograd.grad((want[:, :-1] + entropy[:, :-1]).sum(), weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
