"""From [algorithm] to functions: loss, advantage and mask by name, with their options bound.

A name is a row of `LOSSES`, `ADVANTAGES` or `MASKS`; a loss or an advantage may also be a user
function as "module:function". An option is a keyword of the function and is checked against its
annotation. Functions of the tables are checked when settings are read, user functions when a job
starts (`load_algorithm`).
"""

from __future__ import annotations

import hashlib
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from pydantic import TypeAdapter, ValidationError

from rl_lora.advantages import ADVANTAGES, AdvantageFn, TermRewards, takes_terms
from rl_lora.errors import UserError, nearest
from rl_lora.losses import LOSSES, MASKS, LossFn, LossInputs, needs_of

if TYPE_CHECKING:
    from rl_lora.config import AlgorithmSection, RunConfig

Options = dict[str, Any]


class Algorithm(NamedTuple):
    """What [algorithm] names, with options bound.

    Example: Algorithm(loss=partial(ppo, clip_low=0.2), advantage=grpo, terms={"mask": None, ...})
    """

    loss: LossFn
    advantage: AdvantageFn
    terms: Options  # keywords of `Learner.update`: the mask, and what is added to the loss


def check_algorithm(section: AlgorithmSection) -> None:
    """Checks names and, unless one is "module:function", the options.

    Raises:
        UserError: an unknown name or option, a bad value, or a denominator that does not fit.
    """
    loss = _row("loss", section.loss, LOSSES)
    advantage = _row("advantage", section.advantage, ADVANTAGES)
    if loss is not None and advantage is not None:
        _bound(section, loss, advantage)


def load_algorithm(section: AlgorithmSection) -> Algorithm:
    """Loss, advantage and mask with their options bound; user functions are tried out.

    Raises:
        UserError: as `check_algorithm`; or a user's function cannot be imported, raises, or does
            not return what such a function must.
    """
    loss = _row("loss", section.loss, LOSSES) or imported(section.loss, "algorithm.loss")
    advantage = _row("advantage", section.advantage, ADVANTAGES) or imported(
        section.advantage, "algorithm.advantage"
    )
    found = _bound(section, loss, advantage)
    if section.loss not in LOSSES:
        _try_loss(section.loss, found.loss)
    if section.advantage not in ADVANTAGES:
        _try_advantage(section.advantage, found.advantage)
    return found


def _row(
    kind: str, name: str, table: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any] | None:
    """The function of the table; None for "module:function"."""
    if (kind, name) == ("advantage", "dr_grpo"):
        raise UserError(
            'algorithm.advantage="dr_grpo" is group_mean; write advantage="group_mean", '
            'denominator="max_tokens"'
        )
    if name not in table and ":" not in name:
        raise UserError(
            f"algorithm.{kind}={name!r} is unknown; {nearest(name, table)} (or your own, as "
            "'module:function')"
        )
    return table.get(name)


def imported(name: str, what: str) -> Callable[..., Any]:
    """What "module:name" names, of the user's own or of this project.

    Args:
        name: "module:name".
        what: the setting, for the messages.

    Raises:
        UserError: no such module, or no such name in it.
    """
    from rewards.load import import_function  # loads the verifier, which few settings need

    try:
        return import_function(name, what)
    except ValueError as error:
        raise UserError(str(error)) from error


def user_code(config: RunConfig) -> Iterator[str]:
    """A line for each of the user's functions and classes that a job runs, with its file's hash."""
    names = {
        "reward.name": config.reward.name,
        "algorithm.loss": config.algorithm.loss,
        "algorithm.advantage": config.algorithm.advantage,
        "sampling.backend": config.sampling.backend,
        "environment.name": config.environment.name or "",
        **{f"reward.terms {term.key}": term.name for term in config.reward.terms},
    }
    for key, name in names.items():
        if ":" in name:
            file = inspect.getsourcefile(inspect.unwrap(imported(name, key))) or "no file"
            is_file = Path(file).is_file()
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if is_file else "-"
            yield f"{key}={name} runs code of your own: {file} (sha256 {digest})"


def _bound(section: AlgorithmSection, loss: LossFn, advantage: AdvantageFn) -> Algorithm:
    """The functions with their options bound, which are checked.

    Raises:
        UserError: none has the option, its value is bad, a required one is missing, or the loss is
            defined with another denominator.
    """
    functions: dict[str, Callable[..., Any]] = {"loss": loss, "advantage": advantage}
    if section.mask != "none":
        functions["mask"] = MASKS[section.mask]
    given = {
        kind: _given(kind, getattr(section, kind), function, section.options)
        for kind, function in functions.items()
    }
    if unknown := sorted(section.options.keys() - set().union(*given.values())):
        key = unknown[0]
        known = [name for function in functions.values() for name in _keywords(function)]
        rows = {**LOSSES, **ADVANTAGES, **{f"mask {row!r}": mask for row, mask in MASKS.items()}}
        owners = [row for row, function in rows.items() if key in _keywords(function)]
        if owners:
            names = " and ".join(f"{kind} {getattr(section, kind)!r}" for kind in functions)
            raise UserError(
                f"algorithm.{key} = {section.options[key]!r} is an option of {', '.join(owners)}, "
                f"not of {names}"
            )
        hint = nearest(key, [*known, *type(section).model_fields])
        raise UserError(f"unknown key 'algorithm.{key}'; {hint}")
    denominator = needs_of(loss).denominator
    if denominator not in (None, section.denominator):
        raise UserError(
            f"algorithm.loss={section.loss!r} is defined with algorithm.denominator="
            f"{denominator!r}, not {section.denominator!r}; set it"
        )
    bound = {kind: partial(function, **given[kind]) for kind, function in functions.items()}
    terms = {
        "mask": bound.get("mask"),
        "kl_weight": section.kl_weight if section.kl == "loss" else 0.0,
        "kl_estimator": "k2" if section.kl_estimator == "k2" else "k3",
        "entropy_weight": section.entropy_weight,
    }
    return Algorithm(bound["loss"], bound["advantage"], terms)


def _given(
    kind: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]
) -> Options:
    """The options that the function has, validated by its annotations."""
    keywords, out = _keywords(function), {}
    for key, parameter in keywords.items():
        if key not in options:
            if parameter.default is parameter.empty:
                raise UserError(f"{kind} {name!r} needs the option {key!r}; set algorithm.{key}")
            continue
        try:
            out[key] = TypeAdapter(_annotation(function, parameter)).validate_python(options[key])
        except ValidationError as error:
            raise UserError(
                f"algorithm.{key} = {options[key]!r}: {error.errors()[0]['msg']}"
            ) from error
    return out


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The parameter's annotation, evaluated without the others: those may name types that only a
    type checker imports."""
    if not isinstance(parameter.annotation, str):
        return Any if parameter.annotation is parameter.empty else parameter.annotation
    single = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    return get_type_hints(single, globalns=names, include_extras=True)["it"]


def _try_loss(name: str, loss: LossFn) -> None:
    """Calls a user's loss on two sequences of two tokens."""
    import torch

    policy_C = torch.tensor([-0.5, -0.7, -0.4, -0.9], requires_grad=True)
    x = LossInputs(
        policy_logprobs_C=policy_C,
        sampler_logprobs_C=policy_C.detach(),
        advantages_C=torch.tensor([0.5, 0.5, -0.5, -0.5]),
        weights_C=torch.full((4,), 0.25),
        sequence_C=torch.tensor([0, 0, 1, 1]),
        num_sequences=2,
        old_logprobs_C=policy_C.detach() if needs_of(loss).old_logprobs else None,
    )
    found = _called("loss", name, loss, x)
    is_pair = isinstance(found, tuple) and len(found) == 2
    if not (is_pair and isinstance(found[0], torch.Tensor) and found[0].shape == ()):
        raise UserError(
            f"algorithm.loss={name!r} must return (loss, num_clipped), a scalar tensor and "
            f"a count; it returned {_shown(found)}"
        )
    if not (found[0].requires_grad and math.isfinite(float(found[0].detach()))):
        raise UserError(
            f"algorithm.loss={name!r} returned {_shown(found[0])}; it must be finite and "
            "carry the gradient of policy_logprobs_C"
        )


def _try_advantage(name: str, advantage: AdvantageFn) -> None:
    """Calls a user's advantage on a group with signal and a tied one."""
    rewards_N_G = [[1.0, 0.0, 0.0], [1.0, 1.0]]
    made_up = TermRewards("made-up", 1.0, rewards_N_G)
    arguments = (rewards_N_G, [made_up]) if takes_terms(advantage) else (rewards_N_G,)
    found = _called("advantage", name, advantage, *arguments)
    try:
        is_like = [len(group) for group in found] == [3, 2]
        is_finite = all(math.isfinite(value) for group in found for value in group)
    except TypeError:
        is_like = is_finite = False
    if not (is_like and is_finite):
        raise UserError(
            f"algorithm.advantage={name!r} must return a finite number for each reward, "
            f"group by group; for {rewards_N_G} it returned {_shown(found)}"
        )


def _called(kind: str, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # the user's own code: any
        raise UserError(
            f"algorithm.{kind}={name!r} raised {type(error).__name__}: {error} when it was "
            "tried out on made-up numbers"
        ) from error


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
