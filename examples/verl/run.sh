#!/usr/bin/env bash
# GRAO in verl on one machine: examples/verl/run.sh [OVERRIDES]. n is G + 1: the last is the reference.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

python -m verl.trainer.main_ppo \
    trainer.use_v1=True \
    algorithm.adv_estimator=grao \
    algorithm.use_kl_in_reward=False \
    +algorithm.grao.beta=0.5 \
    +algorithm.grao.lam=0.6 \
    +algorithm.grao.reference_advantage=clip \
    actor_rollout_ref.rollout.agent.default_agent_loop=grao \
    actor_rollout_ref.rollout.n=9 \
    actor_rollout_ref.rollout.calculate_log_probs=False \
    actor_rollout_ref.rollout.temperature=0.7 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
    actor_rollout_ref.actor.policy_loss.loss_mode=grao \
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
    data.train_files="${DATA:-sums}/train.parquet" \
    data.val_files="${DATA:-sums}/test.parquet" \
    data.train_batch_size=64 \
    data.max_prompt_length=128 \
    data.max_response_length=128 \
    reward.custom_reward_function.path="$here/reward.py" \
    trainer.n_gpus_per_node="${GPUS:-1}" \
    trainer.nnodes=1 \
    trainer.total_epochs=1 \
    trainer.logger='["console"]' \
    "$@"
