"""Generated pairs of equal and unequal answers, one generator per kind of trick.

Each returns (one, other, are they equal). The label follows from the construction of the pair,
never from the verifier.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

Pair = tuple[str, str, bool]


def braces(rng: random.Random) -> Pair:
    """An operand moved into or out of an exponent, a root, a denominator or an index."""
    n, name = rng.choice("nkmpt"), rng.choice("xyzab")
    sign, c, d = rng.choice("+-"), rng.randint(1, 9), rng.randint(2, 9)
    b = rng.choice(["2", "3", "10", "e", name])
    e = c + d
    # An expression, the same with a brace moved, and the expression in another spelling.
    rows = [
        (rf"{b}^{{{n}}}{sign}{c}", rf"{b}^{{{n}{sign}{c}}}", rf"{b}^{n} {sign} {c}"),
        (rf"{b}^{{{d}{n}}}", rf"{b}^{{{d}}}{n}", rf"{b}^{{{n}\cdot {d}}}"),
        (rf"\sqrt{{{d}}}{sign}{c}", rf"\sqrt{{{d}{sign}{c}}}", rf"\sqrt {d} {sign} {c}"),
        (rf"\sqrt{{{name}}}{n}", rf"\sqrt{{{name}{n}}}", rf"{n}\sqrt {name}"),
        (rf"\frac{{{c}}}{{{d}}}{n}", rf"\frac{{{c}}}{{{d}{n}}}", rf"\frac{{{c}{n}}}{{{d}}}"),
        (rf"\frac{{{name}}}{{{n}}}+{c}", rf"\frac{{{name}}}{{{n}+{c}}}", rf"{name}/{n} + {c}"),
        (rf"{name}_{{{n}}}{sign}{c}", rf"{name}_{{{n}{sign}{c}}}", rf"{name}_{n}{sign}{c}"),
        (rf"\ln{{{name}}}+{c}", rf"\ln{{{name}+{c}}}", rf"{c}+\ln {name}"),
        (rf"{n}^{{{c}/{e}}}", rf"{n}^{{{c}}}/{e}", rf"{n}^{{\frac{{{c}}}{{{e}}}}}"),
        (rf"{d}^{{{c}}}{e}", rf"{d}^{{{c}{e}}}", rf"{e} \cdot {d}^{c}"),
    ]
    if rng.random() < 0.01:  # sums are decided by workers
        rows = [
            (
                rf"\sum_{{k=0}}^{n}a_k+{c}",
                rf"\sum_{{k=0}}^{n}a_{{k+{c}}}",
                rf"\sum_{{k=0}}^{{{n}}}a_k + {c}",
            ),
        ]
    gold, moved, same = rng.choice(rows)
    return (gold, same, True) if rng.random() < 0.4 else (gold, moved, False)


READ = [
    ("negative {n}", "-{n}"), ("minus {n}", "-{n}"), ("half of {n}", "\\frac{{{n}}}{{2}}"),
    ("twice {n}", "2 \\cdot {n}"), ("the square of {n}", "{n}^2"), ("{n} squared", "{n}^2"),
    ("{n} cubed", "{n}^3"), ("the square root of {n}", "\\sqrt{{{n}}}"),
    ("the reciprocal of {n}", "\\frac{{1}}{{{n}}}"), ("{n} and a half", "{n}.5"),
    ("a third of {n}", "\\frac{{{n}}}{{3}}"), ("{n} thousand", "{n}000"),
    ("at least {n}", "x \\ge {n}"), ("at most {n}", "x \\le {n}"), ("less than {n}", "x < {n}"),
    ("more than {n}", "x > {n}"), ("no more than {n}", "(-\\infty, {n}]"),
    ("no fewer than {n}", "[{n}, \\infty)"), ("{n} or more", "x \\ge {n}"),
    ("{n} or less", "x \\le {n}"), ("not equal to {n}", "x \\ne {n}"),
    ("x is at least {n}", "x \\ge {n}"), ("x is less than {n}", "x < {n}"),
]  # fmt: skip
HARMLESS = [
    "about {n}", "exactly {n}", "only {n}", "a total of {n}", "{n} in total", "{n} apples",
    "the answer is {n}", "there are {n}", "it is {n}", "x is {n}", "{n} solutions",
    "the number of ways is {n}", "{n} is the answer", "approximately {n}", "{n} dollars",
]  # fmt: skip
REFUSED = [
    "anything but {n}", "{n} is incorrect", "{n} is wrong", "a multiple of {n}", "divisible by {n}",
    "a divisor of {n}", "everything except {n}", "{n} does not work", "it is not {n}", "never {n}",
    "all but {n}", "powers of {n}", "{n} isn't right", "the logarithm of {n}", "maybe {n}",
    "{n} is not the answer", "nearly {n}", "one more than {n}", "{n} minus one", "{n} tenths",
    "{n} halves", "I doubt it is {n}", "{n} at most", "the {n}th prime", "the digits of {n}",
    "between 1 and {n}", "{n} by 7", "{n} out of 99",
]  # fmt: skip


def words(rng: random.Random) -> Pair:
    """Words around a number that change it, do not affect it, or reject it."""
    n = rng.randint(2, 60)
    kind = rng.random()
    if kind < 0.3:
        phrase, value = rng.choice(READ)
        return value.format(n=n), phrase.format(n=n), True
    phrase = rng.choice([phrase for phrase, _ in READ] if kind < 0.55 else REFUSED)
    if kind < 0.75:
        return str(n), phrase.format(n=n), False
    phrase = rng.choice(HARMLESS)
    shift = rng.choice([0, 0, 1])
    return str(n + shift), phrase.format(n=n), shift == 0


def signs(rng: random.Random) -> Pair:
    """Equations and inequalities, some of which agree only for positive values."""
    a, b, c = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9)
    left = rng.choice(["y", "f(x)", "g(x)"])
    rows = [
        (f"{left}={a}|x|+{b}", f"{left}={a}x+{b}", False),
        (f"{left}=|x-{a}|", f"{left}=x-{a}", False),
        (f"{left}=|x-{a}|+{b}", f"{left}={b}+|{a}-x|", True),
        (f"{left}={a}x^3", f"{left}={a}|x|^3", False),
        (f"{left}=x|x|", f"{left}=x^2", False),
        (f"{left}=\\sqrt{{(x-{a})^2}}", f"{left}=|x-{a}|", True),
        (f"{left}=\\sqrt{{(x-{a})^2}}", f"{left}=x-{a}", False),
        (f"{left}=\\max(x,{-a})", f"{left}=x", False),
        (f"{left}=\\min(x,{a + 90})", f"{left}=x", False),
        (f"{left}={a}\\lfloor x \\rfloor", f"{left}={a}\\lceil x \\rceil-{a}", False),
        (f"|x-{a}|<{b}", f"({a - b},{a + b})", True),
        (f"|x-{a}|<{b}", f"x<{a + b}", False),
        (f"|{c}x|\\ge {c * b}", f"(-\\infty,-{b}]\\cup[{b},\\infty)", True),
        (f"|x|\\ge {b}", f"x\\ge {b}", False),
        (f"x^2<{b * b}", f"-{b}<x<{b}", True),
        (f"x^2<{b * b}", f"x<{b}", False),
        (f"x^2>{b * b}", f"x>{b}", False),
        (f"{left}={a}x+{b}", f"{left}={b}+{a}x", True),
        (f"y={a}x+{b}", f"{c}y={c * a}x+{c * b}", True),
        (f"y={a}x+{b}", f"y={a}x-{b}", False),
    ]
    return rng.choice(rows)


_FAMILIES: list[list[tuple[str, Fraction]]] = [
    [("mm", Fraction(1, 1000)), ("cm", Fraction(1, 100)), ("m", Fraction(1))],
    [("m", Fraction(1)), ("km", Fraction(1000))],
    [("seconds", Fraction(1)), ("minutes", Fraction(60)), ("hours", Fraction(3600))],
    [("km/h", Fraction(5, 18)), ("m/s", Fraction(1)), ("km/min", Fraction(50, 3))],
    [("g", Fraction(1, 1000)), ("kg", Fraction(1)), ("mg", Fraction(1, 10**6))],
    [("dollars", Fraction(1)), ("cents", Fraction(1, 100))],
    [("cm^2", Fraction(1, 10**4)), ("m^2", Fraction(1)), ("square meters", Fraction(1))],
    [("mL", Fraction(1, 1000)), ("L", Fraction(1)), ("cm^3", Fraction(1, 1000))],
    [("J", Fraction(1)), ("kJ", Fraction(1000)), ("N m", Fraction(1))],
    [("inches", Fraction(1)), ("feet", Fraction(12)), ("yards", Fraction(36))],
    [("N", Fraction(1)), ("kN", Fraction(1000)), ("kg m/s^2", Fraction(1))],
]  # fmt: skip
_NOUNS = ["apple", "orange", "marble", "student", "book", "ticket", "dog", "penguin"]


def units(rng: random.Random) -> Pair:
    """Converted quantities, other units of the same or another kind, counted things."""
    n = rng.randint(2, 400)
    if rng.random() < 0.2:
        one, other = rng.choice(_NOUNS), rng.choice(_NOUNS)
        answer = f"{n} {other}s" if rng.random() < 0.5 else f"{n} \\text{{ {other}s}}"
        return f"{n} \\text{{ {one}s}}", answer, one == other
    family = rng.choice(_FAMILIES)
    (one, size), (other, other_size) = rng.choice(family), rng.choice(family)
    gold = f"{n} \\text{{ {one}}}"
    if rng.random() < 0.3:
        strange, _ = rng.choice(rng.choice([item for item in _FAMILIES if item is not family]))
        return gold, f"{n} \\text{{ {strange}}}", strange == one
    if rng.random() < 0.4:
        return gold, f"{n} \\text{{ {other}}}", size == other_size
    value = n * size / other_size
    printed = (
        str(value)
        if value.denominator == 1
        else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    )
    return gold, f"{printed} \\text{{ {other}}}", True


_NAMES = [
    "x", "y", "a", "AB", "CD", "AC", "P(A)", "P(B)", "f(2)", "f(3)", "g(2)", "\\bar{x}", "\\hat{p}",
    "p", "\\angle ABC", "\\angle ACB", "x_1", "x_2", "S_{10}", "\\sin x", "\\cos x", "E(X)",
    "\\log y", "\\frac{AB}{CD}", "m+n", "p+q", "|z|", "z", "\\overline{z}", "V", "\\theta",
]  # fmt: skip


def names(rng: random.Random) -> Pair:
    """The same value with the same name, another name or no name."""
    n = rng.randint(2, 99)
    one, other = rng.choice(_NAMES), rng.choice(_NAMES)
    kind = rng.random()
    if kind < 0.2:
        return f"{one}={n}", str(n), True
    if kind < 0.4:
        return f"{one} = {n}", f"{one}={n}", True
    if kind < 0.5:
        return f"{one}={n}", f"{one}={n + 1}", False
    return f"{one}={n}", f"{other}={n}", one == other


def logic(rng: random.Random) -> Pair:
    """'and' intersects, 'or' unites."""
    a = rng.randint(-20, 20)
    b = a + rng.randint(1, 20)
    x = rng.choice("xytk")
    rows = [
        (f"({a},{b})", f"{x}>{a} \\text{{ and }} {x}<{b}", True),
        (f"({a},{b})", f"{a}<{x}<{b}", True),
        (f"[{a},{b})", f"{x}\\ge{a}, {x}<{b}", True),
        (f"({a},{b})", f"{x}>{a} \\text{{ or }} {x}<{b}", False),
        (f"(-\\infty,{a})\\cup({b},\\infty)", f"{x}<{a} \\text{{ or }} {x}>{b}", True),
        (f"(-\\infty,{a})\\cup({b},\\infty)", f"{x}<{a} \\text{{ and }} {x}>{b}", False),
        (f"{x}<{a} or {x}>{b}", f"{x}<{a} and {x}>{b}", False),
        (f"{x}<{a} or {x}>{b}", f"{x}>{b} or {x}<{a}", True),
        (f"{x}>{a} and {x}<{b}", f"{x}>{a} or {x}<{b}", False),
        (f"p_{{{b - a}}} \\land q", f"p_{{{b - a}}} \\lor q", False),
        ("\\text{Ann and Bob}", "\\text{Ann or Bob}", False),
        (f"({a},{b}]", f"{x} \\in ({a},{b + 1}) \\cap [{a - 1},{b}]", True),
        (f"{x} \\ne {a}, {b}", f"(-\\infty,{a})\\cup({a},{b})\\cup({b},\\infty)", True),
        (f"{x} \\ne {a}", f"(-\\infty,{a})\\cup({a},{b})\\cup({b},\\infty)", False),
        (f"\\mathbb{{R}} - \\{{{a}\\}}", f"(-\\infty,{a}) U ({a},\\infty)", True),
    ]
    return rng.choice(rows)


def moduli(rng: random.Random) -> Pair:
    """Congruences with the same and with other residues and moduli."""
    m = rng.randint(3, 30)
    r, shift = rng.randrange(m), rng.randint(-3, 3)
    forms = ["{x} \\equiv {r} \\pmod{{{m}}}", "{x}\\equiv {r} (mod {m})", "{x} \\equiv {r} ({m})"]
    x = rng.choice("xny")
    gold = rng.choice(forms).format(x=x, r=r, m=m)
    same = rng.choice(forms).format(x=x, r=r + shift * m, m=m)
    rows = [
        (same, True),
        (f"{x}={m}k+{r}", True),
        (rng.choice(forms).format(x=x, r=r, m=m + rng.randint(1, 5)), False),
        (rng.choice(forms).format(x=x, r=r + 1, m=m), False),
        (rng.choice(forms).format(x="z", r=r, m=m), False),
        (str(r), False),
        (f"{x}={r}", False),
        (f"{x}={m + 1}k+{r}", False),
    ]
    return (gold, *rng.choice(rows))


GENERATORS: dict[str, Callable[[random.Random], Pair]] = {
    "braces": braces,
    "words": words,
    "signs": signs,
    "units": units,
    "names": names,
    "logic": logic,
    "moduli": moduli,
}
