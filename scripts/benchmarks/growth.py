"""How a sweep's numbers grow: least-squares fits, as a table and as records.

In samples or tokens, a power law, factor x number^exponent, fitted on logarithms. In the rank, a
line, intercept + slope x rank: the article's count is 2 N^2 + 6 N R multiply-adds a token
for a layer of N x N ('LoRA Without Regret', the section on compute efficiency;
rl_lora.planning has it for whole models), so a power law would make no sense there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

SWEPT = {"samples": "num_samples", "tokens": "max_tokens", "ranks": "rank", "layers": "layers"}
QUANTITIES = {
    "s": "seconds of learning",
    "gflop": "GFLOP of products",
    "mflop_per_token": "MFLOP a token",
    "memory_mb": "peak MiB",
}
PHASES = ("sample", "score", "learn", "publish")
LEAST_POINTS = 2


class Power(NamedTuple):
    """y = factor x^exponent; residual: root mean square of ln(y / fitted), so about relative."""

    factor: float
    exponent: float
    residual: float

    def at(self, x: float) -> float:
        """The fitted y."""
        return float(self.factor * x**self.exponent)

    def text(self) -> str:
        """As shown in the table."""
        return f"{self.factor:.3g} x n^{self.exponent:.3f}"


class Line(NamedTuple):
    """y = intercept + slope x; residual: root mean square of the misses over the mean of y."""

    intercept: float
    slope: float
    residual: float

    def at(self, x: float) -> float:
        """The fitted y."""
        return self.intercept + self.slope * x

    def text(self) -> str:
        """As shown in the table."""
        is_flat = abs(self.slope) < 1e-12 * abs(self.intercept)  # what rounding leaves
        return f"{self.intercept:.4g} + {0 if is_flat else self.slope:.3g} n"


def power_law(xs: Sequence[float], ys: Sequence[float]) -> Power:
    """Least squares of ln y on ln x.

    Raises:
        ValueError: fewer than two different numbers, or one that is not positive.
    """
    if min((*xs, *ys), default=0) <= 0:
        raise ValueError("a power law needs positive numbers")
    logs = line([float(np.log(x)) for x in xs], [float(np.log(y)) for y in ys])
    misses = [np.log(y) - logs.at(float(np.log(x))) for x, y in zip(xs, ys, strict=True)]
    return Power(
        float(np.exp(logs.intercept)), logs.slope, float(np.sqrt(np.mean(np.square(misses))))
    )


def line(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Least squares of y on x.

    Raises:
        ValueError: fewer than two different x.
    """
    if len(set(xs)) < LEAST_POINTS:
        raise ValueError("a fit needs two different numbers")
    slope, intercept = (float(c) for c in np.polyfit(xs, ys, 1))
    misses = np.asarray(ys) - (intercept + slope * np.asarray(xs))
    scale = abs(float(np.mean(ys))) or 1.0
    return Line(intercept, slope, float(np.sqrt(np.mean(np.square(misses)))) / scale)


def fits(kind: str, rows: Sequence[dict[str, Any]]) -> dict[str, Power | Line]:
    """{column: fit} of a sweep's numeric columns in what was swept; {} for a sweep of layers.

    Args:
        kind: "samples", "tokens", "ranks" or "layers".
        rows: the sweep's rows, one a size.
    """
    xs = [row[SWEPT[kind]] for row in rows]
    if kind == "layers" or len(set(xs)) < LEAST_POINTS:
        return {}
    fit = line if kind == "ranks" else power_law
    return {name: fit(xs, [row[name] for row in rows]) for name in columns(rows)}


def columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The measured columns whose values are all positive, in the table's order."""
    names = [f"{arm}_{quantity}" for quantity in QUANTITIES for arm in ("learner", "full")]
    names += [f"{arm}_formula_mflop_per_token" for arm in ("learner", "full")]
    names += ["tokens", *(f"step_{phase}_s" for phase in PHASES)]
    names += [f"step_{phase}_memory_mb" for phase in PHASES]
    return [name for name in names if all(row.get(name, 0) > 0 for row in rows)]


def records(found: dict[str, Power | Line]) -> dict[str, dict[str, Any]]:
    """The fits for JSON."""
    return {
        name: {"form": "power" if isinstance(fit, Power) else "line", **fit._asdict()}
        for name, fit in found.items()
    }


def against_formula(found: dict[str, Power | Line]) -> dict[str, dict[str, float]]:
    """{arm: {"intercept": measured / formula, "slope": likewise}} of a sweep of ranks.

    1 is the formula. Full fine-tuning has no slope to compare.
    """
    out: dict[str, dict[str, float]] = {}
    for arm in ("learner", "full"):
        measured = found.get(f"{arm}_mflop_per_token")
        formula = found.get(f"{arm}_formula_mflop_per_token")
        if isinstance(measured, Line) and isinstance(formula, Line):
            out[arm] = {"intercept": measured.intercept / formula.intercept}
            if arm == "learner":
                out[arm]["slope"] = measured.slope / formula.slope
    return out


def sweep_tables(kind: str, rows: Sequence[dict[str, Any]]) -> list[Table]:
    """The measurements, one column per size, and the fits with their residuals."""
    measured = Table(title=f"sweep of {kind}: LoRA (learner) and full fine-tuning")
    measured.add_column(SWEPT[kind])
    for row in rows:
        measured.add_column(str(row[SWEPT[kind]]), justify="right")
    names = columns(rows)
    for name in names:
        measured.add_row(name, *(f"{row[name]:.4g}" for row in rows))
    for quantity in QUANTITIES:
        ours, full = f"learner_{quantity}", f"full_{quantity}"
        if ours in names and full in names:
            ratios = [f"{row[ours] / row[full]:.3f}" for row in rows]
            measured.add_row(f"LoRA / full, {quantity}", *ratios)
    found = fits(kind, rows)
    if not found:
        return [measured]
    fitted = Table(title=f"growth, n = {SWEPT[kind]}")
    for title in ("of", "fit", "residual"):
        fitted.add_column(title, justify="left" if title == "of" else "right")
    for name, fit in found.items():
        fitted.add_row(name, fit.text(), f"{fit.residual:.1%}")
    for arm, ratios_by_part in against_formula(found).items():
        for part, ratio in ratios_by_part.items():
            formula = "3 N^2" if arm == "full" else "2 N^2 + 6 N R"
            fitted.add_row(f"{arm}: {part}, measured / {formula}", f"{ratio:.4f}", "")
    return [measured, fitted]
