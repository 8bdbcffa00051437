"""Rule-based verification of maths answers. Imports neither torch nor rl_lora."""

from rewards.grading import Grader, score, score_batch, verify
from rewards.load import REWARDS, load_reward
from rewards.policy import POLICIES, Policy, load_policy
from rewards.types import STATUSES, Reward, Score, Status, Verdict

__all__ = [
    "POLICIES",
    "REWARDS",
    "STATUSES",
    "Grader",
    "Policy",
    "Reward",
    "Score",
    "Status",
    "Verdict",
    "load_policy",
    "load_reward",
    "score",
    "score_batch",
    "verify",
]
