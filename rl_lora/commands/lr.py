"""`rl-lora lr MODEL`: the learning-rate rule of 'LoRA Without Regret', from its config.json.

The rule is a fit over supervised sweeps: the best rate of full fine-tuning is
5e-5 (2000 / hidden)^P, with an exponent P for the model's family, and LoRA's is 10 times that at
any rank (the article's fit: 9.8 times), or about 15 times in runs of under about 100 steps (the
cookbook's get_lr has the constants). For RL it is an upper bound: public recipes for mathematics
use 1e-5 to 1e-4.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rl_lora.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BASE_RATE = 5e-5  # of full fine-tuning at the reference width
REFERENCE_HIDDEN = 2000
LORA_FACTOR = 10.0  # LoRA's best rate over full fine-tuning's, long runs
SHORT_FACTOR = 15.0  # the same in short runs
SHORT_STEPS = 100  # steps below which a run is short
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}  # family -> P
FITTED_HIDDEN = (2048, 8192)  # widths of the Llama and Qwen models that the rule was fitted on


def full_rate(family: str, hidden: int) -> float:
    """The best rate of full fine-tuning, 5e-5 (2000 / hidden)^P ('LoRA Without Regret').

    Raises:
        UserError: the family has no fitted exponent.
    """
    if family not in EXPONENTS:
        known = " and ".join(EXPONENTS)
        raise UserError(
            f"the learning-rate rule has exponents only for {known}, not for {family!r}: sweep "
            "optim.lr, or borrow one of theirs with --family"
        )
    return BASE_RATE * (REFERENCE_HIDDEN / hidden) ** EXPONENTS[family]


def family_of(config: PretrainedConfig) -> str:
    """The family whose exponent applies, llama or qwen; otherwise the model_type itself."""
    model_type = str(config.get_text_config().model_type)
    return next((name for name in EXPONENTS if model_type.startswith(name)), model_type)


def rule_text(family: str, hidden: int, origin: str) -> str:
    """The rule's rates for a model, their source and limits. Raises UserError as `full_rate`."""
    full = full_rate(family, hidden)
    low, high = FITTED_HIDDEN
    lines = [
        f"width {hidden}, family {family} (exponent {EXPONENTS[family]}), from {origin}",
        "",
        f"  LoRA, any rank, {SHORT_STEPS} or more steps   {full * LORA_FACTOR:.2e}",
        f"  LoRA, any rank, shorter runs        {full * SHORT_FACTOR:.2e}",
        f"  full fine-tuning                    {full:.2e}",
        "",
        f"rule: {BASE_RATE:g} x (2000 / width)^P for full fine-tuning, {LORA_FACTOR:g} times that "
        f"for LoRA, {SHORT_FACTOR:g} times in short runs",
        "source: 'LoRA Without Regret' (Thinking Machines, 2025) and its cookbook's get_lr; fitted",
        "  on supervised sweeps with alpha 32, Adam, constant rate, adapters on all layers",
        "limits: a first guess; sweep a factor of 3 to either side. For RL it is an upper bound:",
        "  public recipes for mathematics use 1e-5 to 1e-4.",
    ]
    if not low <= hidden <= high:
        lines.append(
            f"warning: width {hidden} is outside {low} to {high}, the range of the fit; do "
            "not trust the rule here without a sweep"
        )
    return "\n".join(lines)


EXAMPLES = (
    "rl-lora lr meta-llama/Llama-3.1-8B",
    "rl-lora lr path/to/model",
    "rl-lora lr --family qwen --hidden 4096",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rl-lora lr`."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a name, a directory or a hub id; only its config.json is read",
    )
    parser.add_argument(
        "--hidden", type=int, metavar="N", help="hidden size (default: the model's hidden_size)"
    )
    parser.add_argument("--family", help=f"{' or '.join(EXPONENTS)} (default: the model's)")


def run(arguments: argparse.Namespace) -> int:
    """Prints the rule for the model. Raises UserError if the model or its family is unknown."""
    if arguments.hidden is not None and arguments.hidden < 1:
        raise UserError(f"--hidden {arguments.hidden}: a model's width is positive")
    if arguments.hidden is not None and arguments.family is not None:
        print(rule_text(arguments.family, arguments.hidden, "the command line"))
        return 0
    if arguments.model is None:
        raise UserError("name a model, or give both --hidden and --family")
    from rl_lora.config import ModelSection
    from rl_lora.models.shapes import find_model_dir, load_model_config

    name = arguments.model
    config, origin = load_model_config(ModelSection(name=name), find_model_dir(name))
    hidden = arguments.hidden or int(config.get_text_config().hidden_size)
    print(rule_text(arguments.family or family_of(config), hidden, origin))
    return 0
