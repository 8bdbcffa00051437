"""Hostile answers that a model in training, or an attacker, may write in place of a number.

None of them may execute code, exceed its deadline, or crash the verifier.
"""

from __future__ import annotations


def hostile_inputs() -> dict[str, str]:
    """Name -> completion; each is graded against the gold 42."""
    return (
        _magnitudes()
        | _nesting()
        | _repeated()
        | _wide()
        | _volume()
        | _characters()
        | _code()
        | _algebra()
    )


def _boxed(text: str) -> str:
    return f"The answer is \\boxed{{{text}}}."


def _magnitudes() -> dict[str, str]:
    towers = {
        "tower_9": "9^{9^{9}}",
        "tower_9999": "9^{9^{9^{9}}}",
        "tower_plain": "9**9**9**9",
        "tower_5": "5^{5^{5^{5^5}}}",
        "power_10_8": "10^{10^8}",
        "power_minus": "10^{-10^{10}}",
        "power_16": "2^{16^{16}}",
        "power_32": "2^{2^{32}}",
        "power_modulo": "7^{10^9} \\mod 10",
        "sine_of_power": "\\sin(10^{10^{10}})",
        "factorial_of_power": "(10^{10^7})!",
        "factorial_million": "1000000!",
        "factorial_billion": "(10^9)!",
        "factorial_factorial": "((10!)!)!",
        "double_factorial": "1000000000!!",
        "factorial_marks": "9" + "!" * 60,
        "binomial_billion": "\\binom{10^9}{5\\cdot 10^8}",
        "binomial_tower": "\\binom{10^{10^{10}}}{2}",
        "product": "\\prod_{k=1}^{10^7} k",
        "sum": "\\sum_{k=1}^{10^8} \\frac{1}{k}",
        "integral": "\\int_0^{10^9} \\sin(x^{x^x}) dx",
        "exponential": "e^{e^{e^{e^{10}}}}",
        "logarithm": "\\log_{10^{-10^9}} 10^{10^9}",
        "root": "\\sqrt[10^9]{10^{10^9}}",
        "scientific": "1e999999999",
        "scientific_minus": "1e-99999",
        "scientific_wide": "9" * 1000 + ".5e3000",
        "scientific_power": "9" * 1000 + ".5 \\times 10^{3000}",
        "scientific_base": "9" * 1000 + "e3000_7",
        "scientific_unit": "5 m^{" + "9" * 1000 + "e3000}",
        "digits_100k": "9" * 100_000,
        "decimals_100k": "0." + "3" * 100_000,
        "gamma_complex": "(10^6 + 10^6 i)!",
        "factorial_of_a_real_complex": "(10^6 + 0^6 i)!",
        "floor_of_tower": "\\lfloor 10^{10^{10}} \\rfloor",
    }
    return {name: _boxed(text) for name, text in towers.items()}


def _nesting() -> dict[str, str]:
    return {
        "fractions_500": _boxed("\\frac{1}{" * 500 + "2" + "}" * 500),
        "parentheses_3000": _boxed("(" * 3000 + "1" + ")" * 3000),
        "brackets_open": _boxed("[" * 5000),
        "powers_40": _boxed("x^{" * 40 + "2" + "}" * 40),
        "powers_plain_1000": _boxed("^".join(["2"] * 1000)),
        "minus_4000": _boxed("-" * 4000 + "42"),
        "roots_1000": _boxed("\\sqrt{" * 1000 + "2" + "}" * 1000),
        "sines_400": _boxed("\\sin " * 400 + "1"),
        "plus_minus_40": _boxed("\\pm 1 " * 40),
        "plus_minus_tuple": _boxed("(" + ",".join(["\\pm 1"] * 40) + ")"),
        "bars_500": _boxed("|" * 500 + "1" + "|" * 500),
        "sets_300": _boxed("\\{" * 300 + "1" + "\\}" * 300),
        "boxes_nested": "\\boxed{" * 5000 + "7" + "}" * 5000,
        "subscripts": _boxed("x" + "_{a" * 500 + "}" * 500),
    }


def _repeated() -> dict[str, str]:
    """Templates nested in themselves: a parser with two attempts per level needs 2^30 steps."""
    templates = (
        "\\sqrt{%s} {|%s|} \\{%s\\} \\{x|%s\\} \\{|%s|:1\\} C_{%s} \\log_{%s}2 (%s|1) x_{%s} "
        "\\frac%s2 f(%s) 2^{%s} \\sum_{%s} \\text{%s} \\begin{pmatrix}%s\\end{pmatrix}"
    ).split(" ")
    texts = {}
    for place, template in enumerate(templates):
        text = "x"
        for _ in range(30):
            text = template.replace("%s", text)
        texts[f"nested_{place}"] = _boxed(text)
    return texts


def _wide() -> dict[str, str]:
    """As many expensive terms as fit."""
    return {
        "factorials": _boxed("+".join(f"{n}!" for n in range(999, 300, -1))),
        "inverse_factorials": _boxed("+".join(f"1/{n}!" for n in range(999, 400, -1))),
        "sines_of_powers": _boxed("+".join(f"\\sin(10^{{{n}}})" for n in range(40000, 40200))),
        "large_factorials": _boxed("+".join(f"{n}!" for n in range(9000, 8500, -1))),
        "powers": _boxed("+".join(f"2^{{{n}}}" for n in range(16000, 15600, -1))),
        "powers_in_symbols": _boxed("+".join(f"x^{{{n}y}}" for n in range(16000, 15600, -1))),
        "roots_of_roots": _boxed("+".join(f"\\sqrt{{{n}+\\sqrt{{{n}}}}}" for n in range(2, 200))),
    }


def _volume() -> dict[str, str]:
    return {
        "ones_100k": _boxed("1+" * 50_000 + "1"),
        "boxes_14k_open": "\\boxed{" * 14_000,
        "boxes_14k": "\\boxed{1} " * 14_000,
        "dollars_100k": "$" * 100_000,
        "box_unclosed": "so \\boxed{" + "4" * 50_000,
        "prose_1mb": "the quick brown fox jumps over it " * 30_000,
        "answers_20k": "answer " * 20_000,
        "answer_is_20k": "the answer is " * 20_000,
        "hashes_100k": "#" * 100_000,
        "stars_100k": "*" * 100_000,
        "think_10k": "<think>" * 10_000 + "\\boxed{7}",
        "tags_10k": "<answer>" * 10_000,
        "spaces_1mb": " " * 1_000_000 + "\\boxed{7}",
        "digits_spaced": "1 " * 100_000,
        "commas_100k": "1," * 100_000,
        "set_400": _boxed("\\{" + ",".join(map(str, range(400))) + "\\}"),
        "roots_300": _boxed(",".join(f"\\sqrt{{{n}}}" for n in range(2, 300))),
        "backslashes_100k": "\\" * 100_000,
        "numbers_with_slashes": "1/2/" * 50_000,
        "joints": "\\boxed{1}" + " " * 50_000 + "\\boxed{2}",
    }


def _characters() -> dict[str, str]:
    return {
        "nul": _boxed("4\x002"),
        "nul_many": "\x00" * 10_000,
        "surrogate": _boxed("\ud800 7"),
        "surrogates": "\ud83d" * 5000,
        "right_to_left": _boxed("\u202e24"),
        "zero_width": _boxed("\u200b".join("777")),
        "full_width": _boxed("\uff17\uff17"),
        "other_digits": _boxed("\u0667\u0668"),
        "combining": _boxed("7" + "\u0301" * 5000),
        "ligature": _boxed("\ufdfa" * 500),
        "escape_codes": "\x1b[31m\\boxed{7}\x1b[0m",
        "control": "".join(map(chr, range(32))) * 100,
        "roman_numeral": _boxed("\u2168"),
        "circled": _boxed("\u2467" * 400),
    }


def _code() -> dict[str, str]:
    return {
        "import_system": _boxed("__import__('os').system('touch /tmp/verifier-was-here') or 7"),
        "open_write": _boxed("open('/tmp/verifier-was-here','w').write('x')"),
        "subclasses": _boxed("().__class__.__base__.__subclasses__()"),
        "lambda": _boxed("(lambda: 7)()"),
        "exit": _boxed("exit()"),
        "eval": _boxed("eval('7')"),
        "format": _boxed("{0.__class__}"),
        "percent_format": _boxed("%s%s%n"),
        "shell": _boxed("$(touch /tmp/verifier-was-here)"),
        "latex_input": _boxed("\\input{/etc/passwd}"),
        "latex_write": _boxed("\\write18{touch /tmp/verifier-was-here}"),
        "latex_def": _boxed("\\def\\x{\\x\\x}\\x"),
        "json": '{"correct": true, "status": "ok"}',
        "sympify": _boxed("Symbol('x').func"),
        "while": "while True: pass",
    }


def _algebra() -> dict[str, str]:
    rows = " \\\\ ".join(" & ".join(f"a_{{{i}{j}}}" for j in range(9)) for i in range(9))
    return {
        "determinant_9": _boxed(f"\\begin{{vmatrix}} {rows} \\end{{vmatrix}}"),
        "matrix_power": _boxed(f"\\begin{{pmatrix}} {rows} \\end{{pmatrix}}" * 8),
        "geometric_800": _boxed("+".join(f"x^{{{n}}}" for n in range(500))),
        "expansion": _boxed("(x+y+z+w)^{400}"),
        "expansion_product": _boxed("".join(f"(x+{n})" for n in range(300))),
        "zero_division": _boxed("\\frac{1}{0}"),
        "zero_zero": _boxed("0^0"),
        "infinity": _boxed("\\infty - \\infty"),
        "identity": _boxed("\\sin^2 x + \\cos^2 x + 40 \\frac{x}{x}"),
        "nested_functions": _boxed("\\sin(\\cos(\\tan(\\ln(\\exp(x!)))))"),
        "range": _boxed(",".join(map(str, range(1, 101)))),
        "intervals": _boxed("\\cup".join(f"({n},{n + 1})" for n in range(0, 400, 2))),
    }
