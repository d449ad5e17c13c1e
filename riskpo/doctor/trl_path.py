"""A real trl.GRPOTrainer around hidden states that are given rather than computed."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from riskpo.doctor.packages import attribute
from riskpo.doctor.problem import Problem, Results, leaves, results


def trainer_loss(problem: Problem) -> Results:
    """GRPOTrainer._compute_loss on the problem's hidden states, and the log-probs of its head."""
    hidden, weight, _ = leaves(problem)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(problem, folder)
    model = trainer.model
    give_hidden_states(model, hidden, weight)
    B, T = problem.target.shape
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": problem.target,
        "completion_mask": problem.mask.long(),
        "advantages": problem.advantage,
        "old_per_token_logps": problem.old_logprob,
        "num_items_in_batch": problem.mask.sum(),
    }
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        logprob, entropy, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, attention, T, compute_entropy=True
        )
    loss = trainer._compute_loss(model, inputs)
    return results(problem, (hidden, weight), loss, logprob=logprob, entropy=entropy)


def build_trainer(problem: Problem, folder: str) -> Any:
    """A GRPOTrainer of a one-layer Qwen2 with the problem's width and vocabulary, on the CPU.

    It asks for a tokenizer and never uses it.
    """
    from riskpo.demo import build_tokenizer

    dataset = attribute("datasets", "Dataset").from_list([{"prompt": "1"}] * 8)
    vocab, width = problem.weight.shape
    config = attribute("transformers", "Qwen2Config")(
        vocab_size=vocab, hidden_size=width, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = attribute("transformers", "Qwen2ForCausalLM")(config).to(problem.hidden.dtype)
    arguments = attribute("trl", "GRPOConfig")(
        output_dir=folder, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        loss_type="grpo", beta=0.0, epsilon=0.2, temperature=1.0, num_generations=2,
        per_device_train_batch_size=2, max_completion_length=problem.target.shape[1],
    )  # fmt: skip
    trainer = attribute("trl", "GRPOTrainer")(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=dataset,
        processing_class=build_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def give_hidden_states(model: Any, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Let the decoder return `hidden` [B, T, D] (and a last state nobody reads) and the head use
    `weight`, both as the leaves that they are."""
    output = attribute("transformers.modeling_outputs", "BaseModelOutputWithPast")

    def forward(*_: Any, **__: Any) -> Any:
        last = torch.zeros_like(hidden[:, :1])
        return output(last_hidden_state=torch.cat([hidden, last], 1))

    model.model.forward = forward
    del model.lm_head.weight
    model.lm_head.weight = weight
