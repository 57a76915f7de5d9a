#!/usr/bin/env bash
# L1-Exact (arXiv 2503.04697) on verl and Ray: the rows, the reward and the settings of l1_exact.args.
#   bash integrations/verl_l1_exact.sh [NODES] [GPUS_PER_NODE]     one node of 8 GPUs unless said otherwise
# NOT RUN: neither GPUs nor a cluster were at hand. What the tests run with the real verl 0.9.1 on a CPU: its
# configuration takes every flag below, its dataset class reads the rows, its reward loop returns our scores.
#
# In verl's environment (pip install verl==0.9.1 with its vLLM extra; Python 3.10-3.12), plus
#   pip install math-verify==0.9.0
# Several nodes: first, with this repository at the same path on all of them,
#   ray start --head                    on the first
#   ray start --address=FIRST:6379      on the others
set -euo pipefail
HERE=$(cd "$(dirname "$0")/.." && pwd)
NODES=${1:-1} GPUS=${2:-8} MODEL=agentica-org/DeepScaleR-1.5B-Preview

mkdir -p "$HERE/data"
cd "$HERE"
[ -e data/verl_l1_exact.parquet ] || python data.py deepscaler --budgets uniform:100:4000 --mode exact --wording l1 \
    --seed 0 --exclude math500 --max-prompt-tokens 1024 --tokenizer "$MODEL" --export verl --out data/verl_l1_exact.parquet
[ -e data/verl_math500.parquet ] || python data.py math500 --budgets bucket:512,1024,2048,3600 --mode exact --wording l1 \
    --copies 4 --export verl --out data/verl_math500.parquet

# 128 prompts x 16 responses in mini-batches of 64 prompts, KL in the loss (0.001, low_var_kl), entropy bonus 0.001,
# temperature 0.6, responses of at most 4096 tokens, 700 steps. Memory: dynamic batches of 16,384 tokens a GPU.
python -m verl.trainer.main_ppo \
    data.train_files=$HERE/data/verl_l1_exact.parquet data.val_files=$HERE/data/verl_math500.parquet \
    data.train_batch_size=128 data.max_prompt_length=1024 data.max_response_length=4096 \
    reward.custom_reward_function.path=$HERE/integrations/hosts.py reward.custom_reward_function.name=compute_score \
    +reward.custom_reward_function.reward_kwargs.reward=lcpo_exact \
    +reward.custom_reward_function.reward_kwargs.alpha=0.0003 \
    +reward.custom_reward_function.reward_kwargs.require_think=True \
    reward.reward_manager.source=importlib reward.reward_manager.name=VerlRewardManager \
    reward.reward_manager.module.path=$HERE/integrations/hosts.py \
    algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False \
    actor_rollout_ref.model.path=$MODEL actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl actor_rollout_ref.actor.entropy_coeff=0.001 \
    actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.rollout.temperature=0.6 actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
    trainer.nnodes=$NODES trainer.n_gpus_per_node=$GPUS trainer.total_training_steps=700 \
    trainer.save_freq=50 trainer.test_freq=50 trainer.logger=[console] \
    trainer.project_name=nanol1 trainer.experiment_name=verl_l1_exact
