"""Rule-based verification of maths answers. Imports neither torch nor rl_lora."""

from rewards.combined import CombinedReward, Term
from rewards.grading import Grader, score, score_batch, verify
from rewards.load import REWARDS, load_reward
from rewards.rules import RULES, GradingRules, load_rules
from rewards.types import STATUSES, Reward, RewardError, Score, Status, Verdict
from rewards.user_function import FunctionReward

__all__ = [
    "REWARDS",
    "RULES",
    "STATUSES",
    "CombinedReward",
    "FunctionReward",
    "Grader",
    "GradingRules",
    "Reward",
    "RewardError",
    "Score",
    "Status",
    "Term",
    "Verdict",
    "load_reward",
    "load_rules",
    "score",
    "score_batch",
    "verify",
]
