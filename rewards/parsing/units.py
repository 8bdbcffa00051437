"""Units of measurement as products of powers with scales: 45 km/h is 12.5 m/s.

Definitions: SI brochure (BIPM, 9th edition, 2019); feet, miles, pounds and gallons from NIST
Handbook 44. A year has twelve months but no fixed number of days.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import NamedTuple

MAX_UNIT_CHARS = 80
MAX_EXPONENT = 9


class Unit(NamedTuple):
    """`dimension`: base units with their exponents, sorted. `scale`: size in base units."""

    dimension: tuple[tuple[str, int], ...]
    scale: Fraction


# Each unit is defined by the ones above it.
_BASES = "m kg s A K mol cd dollar celsius fahrenheit bit euro sterling year"
_DEFINITIONS = """
g = 1/1000 kg
N = kg m / s^2
J = N m
W = J / s
Pa = N / m^2
Hz = 1 / s
C = A s
V = W / A
ohm = V / A
F = C / V
Wb = V s
T = Wb / m^2
H = Wb / A
L = 1/1000 m^3
eV = 1602176634/10000000000000000000000000000 J
cal = 4184/1000 J
bar = 100000 Pa
atm = 101325 Pa
min = 60 s
h = 3600 s
day = 86400 s
week = 604800 s
month = 1/12 year
decade = 10 year
century = 100 year
inch = 254/10000 m
ft = 12 inch
yd = 3 ft
mi = 5280 ft
lb = 45359237/100000000 kg
oz = 1/16 lb
ton = 1000 kg
gal = 231 inch^3
quart = 1/4 gal
pint = 1/8 gal
cup = 1/16 gal
hectare = 10000 m^2
acre = 43560 ft^2
mph = mi / h
km = 1000 m
knot = 1852/3600 m / s
cent = 1/100 dollar
byte = 8 bit
rad = 1
rpm = 1/60 Hz
kph = km / h
"""
# Spellings: symbols are case-sensitive, long names are not and have plurals.
_SYMBOLS = "m g s A K mol N J W Pa Hz C V F Wb T H L l eV cal bar"
_LONG = {
    "meter": "m", "metre": "m", "gram": "g", "gramme": "g", "second": "s", "sec": "s",
    "ampere": "A", "amp": "A", "kelvin": "K", "mole": "mol", "newton": "N", "joule": "J",
    "watt": "W", "pascal": "Pa", "hertz": "Hz", "coulomb": "C", "volt": "V", "ohm": "ohm",
    "farad": "F", "weber": "Wb", "tesla": "T", "henry": "H", "liter": "L", "litre": "L",
    "calorie": "cal", "byte": "byte", "bit": "bit",
}  # fmt: skip
_OTHER = {
    "l": "L", "minute": "min", "min": "min", "hour": "h", "hr": "h", "h": "h", "day": "day",
    "d": "day", "week": "week", "month": "month", "year": "year", "yr": "year",
    "decade": "decade", "inch": "inch", "foot": "ft", "feet": "ft", "ft": "ft", "yard": "yd",
    "yd": "yd", "mile": "mi", "mi": "mi", "pound": "lb", "lb": "lb", "lbs": "lb", "ounce": "oz",
    "oz": "oz", "ton": "ton", "tonne": "ton", "gallon": "gal", "gal": "gal", "quart": "quart",
    "pint": "pint", "cup": "cup", "hectare": "hectare", "ha": "hectare", "acre": "acre",
    "mph": "mph", "knot": "knot", "dollar": "dollar", "usd": "dollar", "buck": "dollar",
    "cent": "cent", "euro": "euro", "sterling": "sterling", "celsius": "celsius",
    "fahrenheit": "fahrenheit", "degree": "degree", "deg": "degree", "radian": "rad",
    "rad": "rad", "rpm": "rpm", "kph": "kph", "kmh": "kph",
    "\\Omega": "ohm", "atm": "atm", "century": "century", "centuries": "century",
}  # fmt: skip
_PREFIXES = {
    "T": 12, "G": 9, "M": 6, "k": 3, "d": -1, "c": -2, "m": -3, "u": -6, "\\mu": -6, "n": -9,
    "p": -12,
}  # fmt: skip
_LONG_PREFIXES = {
    "tera": 12, "giga": 9, "mega": 6, "kilo": 3, "hecto": 2, "deci": -1, "centi": -2,
    "milli": -3, "micro": -6, "nano": -9, "pico": -12,
}  # fmt: skip
_PIECE = re.compile(r"\\?[A-Za-z]+|\d+|\^|/|\*|[()]|-")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS_BEHIND = {"squared": 2, "cubed": 3}


def _times(left: Unit, right: Unit, exponent: int) -> Unit:
    powers = dict(left.dimension)
    for base, power in right.dimension:
        powers[base] = powers.get(base, 0) + power * exponent
    kept = tuple(sorted((base, power) for base, power in powers.items() if power))
    return Unit(kept, left.scale * right.scale**exponent)


ONE = Unit((), Fraction(1))


def _table() -> dict[str, Unit]:
    """Every spelling with its unit; long names in lower case."""
    known = {name: Unit(((name, 1),), Fraction(1)) for name in (*_BASES.split(), "degree")}
    for line in _DEFINITIONS.strip().splitlines():
        name, _, definition = line.partition(" = ")
        factor, unit, sign = Fraction(1), ONE, 1
        for piece in definition.split():
            if piece == "/":
                sign = -1
            elif piece[0].isdigit():
                factor *= Fraction(piece)
            else:
                part, _, power = piece.partition("^")
                unit = _times(unit, known[part], sign * int(power or 1))
        if name not in known:
            known[name] = unit._replace(scale=unit.scale * factor)
    found: dict[str, Unit] = {}
    for symbol in _SYMBOLS.split():
        unit = known["L" if symbol == "l" else symbol]
        for prefix, shift in _PREFIXES.items():
            found[prefix + symbol] = unit._replace(scale=unit.scale * Fraction(10) ** shift)
        found[symbol] = unit
    found["kWh"] = Unit(known["J"].dimension, Fraction(3_600_000))
    for name, symbol in _LONG.items():
        for prefix, shift in {"": 0, **_LONG_PREFIXES}.items():
            unit = known[symbol]
            found[prefix + name] = unit._replace(scale=unit.scale * Fraction(10) ** shift)
    found |= {name: known[symbol] for name, symbol in _OTHER.items()}
    long = {name: unit for name, unit in found.items() if len(name) > 2 and name.islower()}
    plurals = {name + ("es" if name == "inch" else "s"): unit for name, unit in long.items()}
    plurals |= {name + "s": found[name] for name in ("cm", "km", "kg", "hr", "yd", "yr", "mi")}
    return plurals | found


TABLE = _table()
# Short words that are units after a number.
UNIT_WORDS = frozenset(
    "mm cm dm km cms kms mg kg kgs ml mL lb lbs ft yd mi hr hrs sec secs min mins yr yrs"
    " inch mph usd USD Hz kHz MHz kPa Pa kN kJ kW MW kWh eV mol rad ms ns nm oz gal rpm kph kmh th"
    " st nd rd".split()
)


def _find(name: str) -> Unit | None:
    if name in TABLE:
        return TABLE[name]
    return TABLE.get(name.lower()) if len(name) > 2 or name.lower() in ("cm", "km", "kg") else None


def is_unit(name: str) -> bool:
    """Is this the symbol or the name of a unit?"""
    return _find(name) is not None


@functools.lru_cache(maxsize=1024)
def read_unit(text: str) -> Unit | None:
    r"""The unit of "cm", "square meters", "km/h", "kg * m^2 / s^2"; None if a word is unknown."""
    if len(text) > MAX_UNIT_CHARS:
        return None
    text = text.replace("{", " ").replace("}", " ").replace(" per ", " / ").rstrip(" .")
    pieces = _PIECE.findall(text)
    if not pieces or re.sub(r"[\s.]", "", text) != "".join(pieces):
        return None
    reader = _Reader(pieces)
    unit = reader.read()
    return unit if reader.position == len(pieces) else None


class _Reader:
    """Reads the pieces of a unit from left to right; a slash divides only by the next factor."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.position = 0

    def _peek(self) -> str:
        return self.pieces[self.position] if self.position < len(self.pieces) else ""

    def read(self) -> Unit | None:
        total, sign, num_factors = ONE, 1, 0
        while piece := self._peek():
            if piece == ")":
                break
            if piece in ("/", "*"):
                self.position += 1
                if self._peek() in ("/", "*", ")", "") or (piece == "*" and not num_factors):
                    return None
                sign = -1 if piece == "/" else 1
                continue
            factor = self._factor()
            if factor is None:
                return None
            total = _times(total, factor, sign)
            sign, num_factors = 1, num_factors + 1
        return total if num_factors else None

    def _factor(self) -> Unit | None:
        power = 1
        while self._peek() in _POWERS:
            power *= _POWERS[self._peek()]
            self.position += 1
        piece = self._peek()
        self.position += 1
        unit: Unit | None
        if piece == "(":
            unit = self.read()
            if self._peek() != ")":
                return None
            self.position += 1
        else:
            unit = _find(piece)
        if unit is None or power > MAX_EXPONENT:
            return None
        exponent = self._exponent()
        return None if exponent is None else _times(ONE, unit, power * exponent)

    def _exponent(self) -> int | None:
        piece = self._peek()
        if piece in _POWERS_BEHIND:
            self.position += 1
            return _POWERS_BEHIND[piece]
        if piece not in ("^", "-") and not piece.isdigit():
            return 1
        sign = 1
        while self._peek() in ("^", "-", "("):
            sign = -1 if self._peek() == "-" else sign
            self.position += 1
        digits = self._peek()
        self.position += 1
        if not digits.isdigit() or int(digits) > MAX_EXPONENT:
            return None
        if self._peek() == ")" and "(" in self.pieces[max(self.position - 4, 0) : self.position]:
            self.position += 1
        return sign * int(digits)
