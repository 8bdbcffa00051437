"""The calculator's arithmetic: exact values, and errors in bounded time for everything else."""

from __future__ import annotations

from fractions import Fraction

import pytest

from rl_lora.environments.arithmetic import as_text, evaluate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12*37", "444"),
        (" 2 + 3 * 4 ", "14"),
        ("(2 + 3) * -4", "-20"),
        ("7 - 2 - 1", "4"),  # from the left
        ("2^3^2", "512"),  # from the right
        ("-2**2", "-4"),
        ("2^-3", "0.125"),
        ("1/3 + 1/6", "0.5"),
        ("22/7", "22/7"),
        ("-0.25 * 3", "-0.75"),
        ("8. ÷ .5 × 2", "32"),
        ("0.1 + 0.2", "0.3"),
        ("--3", "3"),
        ("1/2^20", "0.00000095367431640625"),
        ("1/2^21", "1/2097152"),  # more digits than are shown
    ],
)
def test_values_are_exact(text: str, value: str) -> None:
    assert as_text(evaluate(text)) == value


def test_a_value_is_a_fraction() -> None:
    assert evaluate("1/3") == Fraction(1, 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not arithmetic"),
        ("1 +", "not arithmetic"),
        ("2 3", "not arithmetic"),
        ("()", "not arithmetic"),
        ("1 + * 2", "not arithmetic"),
        ("__import__('os').system('true')", "not arithmetic"),
        ("x + 1", "not arithmetic"),
        ("1e5", "not arithmetic"),
        ("٣ + x", "not arithmetic"),
        ("(1 + 2", "brackets"),
        ("1)", "not arithmetic"),
        ("1/0", "division by zero"),
        ("0^-1", "division by zero"),
        ("4^(1/2)", "not an integer"),
        ("9^9^9^9", "too large"),
        ("1^999999999999", "too large"),
        ("9^9^(0-9^9)", "too large"),
        ("(((2^255)^255)^255)^255", "too large"),
        ("9" * 100, "too large"),
        ("*".join(["9999999999"] * 15), "too large"),
        ("(" * 100 + "1" + ")" * 99, "too deeply nested"),
        ("2^" * 99 + "2", "too deeply nested"),
        ("1+" * 100 + "1", "more than 200 characters"),
        ("(" * 1_000_000, "more than 200 characters"),
    ],
)
def test_everything_else_is_an_error(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        evaluate(text)


def test_a_long_row_of_signs_is_no_nesting() -> None:
    assert evaluate("-" * 199 + "1") == -1
