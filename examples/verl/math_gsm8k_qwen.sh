#!/usr/bin/env bash
# RiskPO on MATH + GSM8K with Qwen2.5-1.5B-Instruct: the paper's easy run (arXiv 2510.00911) in verl,
# on one node of eight GPUs (Ray, FSDP2, vLLM). Never run here: no GPU was at hand.
#
#   pip install riskpo "verl[vllm]==0.9.1"
#   DATA=/data/easy examples/verl/math_gsm8k_qwen.sh [more overrides]
#
# $DATA holds gsm8k/ and math/ with train.parquet and test.parquet each, as verl's
# examples/data_preprocess/gsm8k.py and math_dataset.py write them. Sizes, lengths, learning rate
# and sampling are those of the released script, but for 1040 questions instead of 1024, so that
# bundles of five and two updates come out even, the paper's sequence ratio and aggregation for its
# token-level PPO, and beta 0.8 (the paper) for its 0.9. The paper's clip bounds are not known; these
# are GSPO's.
#
# PRESET=matched runs docs/risk.md's bundles of like questions beside the paper's; difficulty is read
# by no other preset.
set -euo pipefail
PRESET="${PRESET:-paper}"
: "${DATA:?folder with gsm8k/ and math/}"

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=riskpo \
    actor_rollout_ref.actor.policy_loss.loss_mode=riskpo \
    trainer.checkpoint_callback_class=riskpo.integrations.verl.RiskPOCheckpoint \
    +algorithm.riskpo.preset="$PRESET" \
    +algorithm.riskpo.difficulty=cross-fit \
    +algorithm.riskpo.bundle_size=5 \
    reward.custom_reward_function.path=pkg://riskpo.integrations.verl.reward \
    reward.custom_reward_function.name=zero_one \
    data.train_files="['$DATA/gsm8k/train.parquet','$DATA/math/train.parquet']" \
    data.val_files="['$DATA/gsm8k/test.parquet','$DATA/math/test.parquet']" \
    data.train_batch_size=1040 \
    data.max_prompt_length=1024 \
    data.max_response_length=1024 \
    data.filter_overlong_prompts=True \
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.optim.weight_decay=0.01 \
    actor_rollout_ref.actor.ppo_mini_batch_size=520 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768 \
    actor_rollout_ref.actor.clip_ratio_low=3e-4 \
    actor_rollout_ref.actor.clip_ratio_high=4e-4 \
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean \
    actor_rollout_ref.actor.entropy_coeff=0 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=5 \
    actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.top_p=1.0 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
    trainer.n_gpus_per_node="${GPUS:-8}" \
    trainer.nnodes="${NODES:-1}" \
    trainer.total_training_steps=200 \
    trainer.total_epochs=15 \
    trainer.test_freq=5 \
    trainer.save_freq=10 \
    trainer.project_name=riskpo \
    trainer.experiment_name="math_gsm8k_qwen_$PRESET" \
    trainer.logger='["console","tensorboard"]' \
    "$@"
