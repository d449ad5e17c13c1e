"""linear_logprob under TRL's trainers: it runs, it is exact, and it refuses what it is not."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MixtralConfig, MixtralForCausalLM

pytest.importorskip("trl", reason="trl is not installed: pip install 'riskpo[trl]'")

import trl.trainer.utils as host  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from riskpo.demo import build_tokenizer  # noqa: E402
from riskpo.integrations.trl import head as trl_head  # noqa: E402
from riskpo.integrations.trl.trainer import use_riskpo_head  # noqa: E402
from riskpo.model.load import Policy  # noqa: E402
from riskpo_kernels.causal_lm import fused  # noqa: E402
from tests.compare import assert_all_close_as_plain  # noqa: E402
from tests.integrations.trl_toy import trainer  # noqa: E402
from tests.toy import tiny_config, tiny_policy  # noqa: E402

B, T, KEEP = 3, 9, 4


@pytest.fixture
def calls(monkeypatch):
    """Number of calls of our op; TRL's own must not be called at all."""
    seen = []
    op = fused.linear_logprob

    def counted(*args, **kwargs):
        seen.append(kwargs)
        return op(*args, **kwargs)

    def forbidden(*_):
        raise AssertionError("TRL's own head ran")

    monkeypatch.setattr(fused, "linear_logprob", counted)
    monkeypatch.setattr(host._ChunkedLogProbFunction, "apply", forbidden)
    return seen


def gemma() -> Policy:
    """Softcapped logits, and a tied head."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    sizes = {k: v for k, v in tiny_config(len(tokenizer)).to_dict().items() if k in SIZES}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=2.0))
    return Policy(model, tokenizer)


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "pad_token_id",
    "eos_token_id",
)


def tokens(vocab: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    attention = torch.ones(B, T, dtype=torch.long)
    attention[1, -2:] = 0  # two rows without a token
    return {"input_ids": torch.randint(2, vocab, (B, T), generator=g), "attention_mask": attention}


def by_host(run) -> dict[str, torch.Tensor]:
    """Log-probs, entropies and gradients of all parameters for random upstream gradients."""
    inputs = tokens(run.model.config.vocab_size)
    run.model.zero_grad()
    logprob, entropy, _ = run._get_per_token_logps_and_entropies(
        run.model, inputs["input_ids"], inputs["attention_mask"], KEEP, compute_entropy=True
    )
    return results(run.model, logprob, entropy)


def by_torch(model, temperature: float) -> dict[str, torch.Tensor]:
    """The same from the model's own logits."""
    inputs = tokens(model.config.vocab_size)
    model.zero_grad()
    logits = model(**inputs).logits[:, -KEEP - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    live = inputs["attention_mask"][:, -KEEP:] != 0
    target = inputs["input_ids"][:, -KEEP:, None]
    entropy = -(logp.exp() * logp).sum(-1)
    return results(model, logp.gather(-1, target)[..., 0] * live, entropy * live)


def results(model, logprob, entropy) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    up = [torch.randn(B, KEEP, generator=g).to(x) for x in (logprob, entropy)]
    ((up[0] * logprob).sum() + (up[1] * entropy).sum()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logprob": logprob, "entropy": entropy, **gradients}


@pytest.mark.parametrize("make", [tiny_policy, gemma], ids=["plain", "softcap-tied"])
def test_log_probs_entropies_and_gradients(tmp_path, calls, make):
    policy = make()
    run = trainer(tmp_path, policy=policy, temperature=0.7)
    got = by_host(run)
    assert len(calls) == 1 and calls[0]["temperature"] == 0.7
    plain = by_torch(policy.model, 0.7)
    truth = by_torch(policy.model.double(), 0.7)
    # at four times plain's error: three layers of float32 gradients are plain's on both sides
    assert_all_close_as_plain(got, truth, plain, factor=4.0)


def test_a_plain_grpo_trainer_takes_it(tmp_path, calls):
    run = trainer(tmp_path, GRPOTrainer, num_iterations=2, max_steps=2)
    use_riskpo_head(run, backend="torch", memory_mib=64, tail_eps=0.0)
    run.train()
    assert len(calls) == 3  # two losses and, as the answers are used twice, one old pass
    assert {(c["backend"], c["memory_mib"], c["tail_eps"]) for c in calls} == {("torch", 64, 0.0)}


def test_our_trainer_takes_it_by_itself_and_can_do_without(tmp_path, calls):
    run = trainer(tmp_path, max_steps=1)
    run.train()
    assert len(calls) == 1
    with pytest.raises(AssertionError, match="TRL's own head ran"):
        trainer(tmp_path, max_steps=1, riskpo_head=False).train()


def test_the_reference_model_takes_it_too(tmp_path, calls):
    policy = tiny_policy()
    policy.model.save_pretrained(tmp_path / "model")
    policy.model.config._name_or_path = str(tmp_path / "model")
    run = trainer(tmp_path, policy=policy, beta=0.1, max_steps=1)
    run.train()
    assert len(calls) == 2
    assert run.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_generation_still_sees_the_models_own_forward(tmp_path):
    run = trainer(tmp_path)
    ids = tokens(run.model.config.vocab_size)["input_ids"]
    assert run.model(input_ids=ids).logits.shape[:2] == (B, T)
    with pytest.raises(ValueError, match="model_kwargs.*nonsense"):
        run.model.generate(input_ids=ids, max_new_tokens=1, nonsense=1)


def test_a_batch_without_any_token_has_a_gradient_of_zero(tmp_path):
    run = trainer(tmp_path)
    inputs = tokens(run.model.config.vocab_size)
    inputs["attention_mask"][:, -KEEP:] = 0
    logprob, entropy, _ = run._get_per_token_logps_and_entropies(
        run.model, inputs["input_ids"], inputs["attention_mask"], KEEP, compute_entropy=True
    )
    (logprob.sum() + entropy.sum()).backward()
    assert not logprob.any() and not run.model.lm_head.weight.grad.any()


def test_autocast_multiplies_in_its_own_dtype(tmp_path, calls, monkeypatch):
    seen = []
    op = fused.linear_logprob

    def dtypes(hidden, weight, *args, **kwargs):
        seen.append((hidden.dtype, weight.dtype))
        return op(hidden, weight, *args, **kwargs)

    monkeypatch.setattr(fused, "linear_logprob", dtypes)
    by_host(trainer(tmp_path, bf16=True))
    by_host(trainer(tmp_path, bf16=True, cast_lm_head_to_fp32=True))
    assert seen == [(torch.bfloat16,) * 2, (torch.float32,) * 2]


@pytest.mark.parametrize("moved", [False, True], ids=["fresh", "trained"])
def test_an_adapter_on_the_head_is_refused(tmp_path, moved):
    policy = adapted(moved=moved, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="(?i)adapter to .*head"):  # by TRL
        trainer(tmp_path, policy=policy)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_are_refused(tmp_path, kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    policy = tiny_policy()
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    policy = Policy(peft.get_peft_model(policy.model, config), policy.tokenizer)
    with pytest.raises(ValueError, match="head: got P.*_TUNING by peft; .*Use LoRA"):
        trainer(tmp_path, policy=policy)


def adapted(*, moved: bool = True, **changes) -> Policy:
    """A policy inside peft's wrapper; its adapters have been trained where `moved`."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    policy = tiny_policy()
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes})
    model = peft.get_peft_model(policy.model, config)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if moved and p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=g))
    return Policy(model, policy.tokenizer)


WEIGHTS = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable tokens": {"trainable_token_indices": {"lm_head": [3, 5], "embed_tokens": [4]}},
    "LoRA of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("moved", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("where", WEIGHTS)
def test_what_peft_makes_a_weight_of_is_computed(tmp_path, calls, where, moved):
    policy = adapted(moved=moved, **WEIGHTS[where])
    run = trainer(tmp_path, policy=policy, temperature=0.7)
    with torch.no_grad():  # and it follows what is trained
        for p in run.model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    got = by_host(run)
    assert len(calls) == 1
    plain = by_torch(policy.model, 0.7)
    assert got.keys() == plain.keys()
    truth = by_torch(policy.model.double(), 0.7)
    assert_all_close_as_plain(got, truth, plain, factor=4.0)


@pytest.mark.parametrize("where", WEIGHTS)
def test_a_run_trains_it(tmp_path, calls, where):
    policy = adapted(**WEIGHTS[where])
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    trainer(tmp_path, policy=policy, max_steps=1, beta=0.1, learning_rate=1.0).train()
    assert len(calls) == 2  # the loss, and the reference with adapters off or as they were
    after = dict(policy.model.named_parameters())  # and TRL's copies for the reference
    trained = {name for name, p in before.items() if not torch.equal(p, after[name])}
    assert trained == {name for name in before if after[name].requires_grad}


def test_adapters_elsewhere_train(tmp_path, calls):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    policy = tiny_policy()
    model = peft.get_peft_model(policy.model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    run = trainer(tmp_path, policy=Policy(model, policy.tokenizer), max_steps=1)
    run.train()
    assert len(calls) == 1 and run.state.log_history[0]["grad_norm"] > 0


def test_a_router_loss_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    sizes = {k: v for k, v in tiny_config(len(tokenizer)).to_dict().items() if k in SIZES}
    config = MixtralConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)
    policy = Policy(MixtralForCausalLM(config), tokenizer)
    with pytest.raises(ValueError, match="router auxiliary loss.*router_aux_loss_coef=0.0"):
        trainer(tmp_path, policy=policy)
    trainer(tmp_path, policy=policy, router_aux_loss_coef=0.0)


def test_a_head_that_does_more_is_refused(tmp_path):
    policy = tiny_policy()
    policy.model.lm_head.register_forward_hook(lambda module, given, out: 1.5 * out)
    with pytest.raises(ValueError, match="head: got the hook .*lambda.* on lm_head"):
        trainer(tmp_path, policy=policy)


def test_images_and_zero3_are_refused(tmp_path, monkeypatch):
    run = trainer(tmp_path, GRPOTrainer)
    monkeypatch.setattr(trl_head, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="got DeepSpeed ZeRO-3; .*ZeRO-2 or FSDP"):
        use_riskpo_head(run)
    run._is_vlm = True
    with pytest.raises(ValueError, match="a model that takes images; expected a text model"):
        use_riskpo_head(run)


def test_only_a_grpo_trainer():
    with pytest.raises(ValueError, match="use_riskpo_head: got a str; expected a trl.GRPOTrainer"):
        use_riskpo_head("trainer")
