"""The training loop by hand, on the public API: GRPO with a LoRA adapter."""

import argparse
import sys
from pathlib import Path

import rl_lora as rl


def main(arguments: list[str]) -> None:
    """Trains and prints each step's mean reward."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256, help="cap of a completion")
    parser.add_argument("--vllm", action="store_true", help="sample with vLLM")
    parser.add_argument("--out", type=Path, default=Path("runs/minimal_grpo"))
    options = parser.parse_args(arguments)

    policy = rl.Policy.load(options.model, rank=1)
    sampler = rl.VllmSampler(policy) if options.vllm else rl.TorchSampler(policy)
    learner = rl.Learner(policy, lr=1e-4)
    train = rl.load_prompts(options.data, policy.tokenizer)
    with rl.load_reward("math") as reward:
        for step in range(options.steps):
            sampler.set_adapter(policy.publish(step))
            groups_N = rl.rollout(
                sampler, train.take(16), reward, num_samples=8, max_tokens=options.tokens, seed=step
            )
            rewards_N_G = [group.rewards_G for group in groups_N]
            batches = rl.pack(groups_N, rl.group_mean(rewards_N_G))
            metrics = learner.update(batches, loss=rl.importance_sampling)
            reward_mean = sum(map(sum, rewards_N_G)) / sum(map(len, rewards_N_G))
            print(f"step {step + 1}: reward {reward_mean:.3f}, KL {metrics['mismatch/kl']:.1e}")
    print(f"trained adapter: {policy.publish(options.steps, options.out).path}")


if __name__ == "__main__":
    main(sys.argv[1:])
