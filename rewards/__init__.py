"""Rule-based verification of maths answers. Imports neither torch nor rl_lora."""

from rewards.grading import Grader, score, score_batch, verify
from rewards.load import REWARDS, load_reward
from rewards.policy import POLICIES, Policy, load_policy
from rewards.types import STATUSES, Reward, RewardError, Score, Status, Verdict
from rewards.user_function import FunctionReward

__all__ = [
    "POLICIES",
    "REWARDS",
    "STATUSES",
    "FunctionReward",
    "Grader",
    "Policy",
    "Reward",
    "RewardError",
    "Score",
    "Status",
    "Verdict",
    "load_policy",
    "load_reward",
    "score",
    "score_batch",
    "verify",
]
