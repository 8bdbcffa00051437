"""Units of measurement as products of powers with scales: 45 km/h is 12.5 m/s.

Definitions: SI brochure (BIPM, 9th edition, 2019); feet, miles, pounds and gallons from NIST
Handbook 44. A year has twelve months but no fixed number of days.
"""

from __future__ import annotations

import functools
import math
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
g = 1/1000 kg; N = kg m / s^2; J = N m; W = J / s; Pa = N / m^2; Hz = 1 / s; C = A s; V = W / A;
ohm = V / A; F = C / V; Wb = V s; T = Wb / m^2; H = Wb / A; L = 1/1000 m^3;
eV = 1602176634/10000000000000000000000000000 J; cal = 4184/1000 J; bar = 100000 Pa;
atm = 101325 Pa; min = 60 s; h = 3600 s; day = 86400 s; week = 604800 s; month = 1/12 year;
decade = 10 year; century = 100 year; inch = 254/10000 m; ft = 12 inch; yd = 3 ft; mi = 5280 ft;
lb = 45359237/100000000 kg; oz = 1/16 lb; ton = 1000 kg; gal = 231 inch^3; quart = 1/4 gal;
pint = 1/8 gal; cup = 1/16 gal; hectare = 10000 m^2; acre = 43560 ft^2; mph = mi / h; km = 1000 m;
knot = 1852/3600 m / s; cent = 1/100 dollar; byte = 8 bit; rad = 1; rpm = 1/60 Hz; kph = km / h
"""
# Unit -> its spellings. Symbols are case-sensitive; long names are not, and have plurals.
_SYMBOLS = "m g s A K mol N J W Pa Hz C V F Wb T H L l eV cal bar"
_LONG = """
m: meter metre, g: gram gramme, s: second sec, A: ampere amp, K: kelvin, mol: mole, N: newton,
J: joule, W: watt, Pa: pascal, Hz: hertz, C: coulomb, V: volt, ohm: ohm, F: farad, Wb: weber,
T: tesla, H: henry, L: liter litre, cal: calorie, byte: byte, bit: bit
"""
_OTHER = r"""
L: l, min: minute min, h: hour hr h, day: day d, week: week, month: month, year: year yr,
decade: decade, century: century centuries, inch: inch, ft: foot feet ft, yd: yard yd, mi: mile mi,
lb: pound lb lbs, oz: ounce oz, ton: ton tonne, gal: gallon gal, quart: quart, pint: pint, cup: cup,
hectare: hectare ha, acre: acre, mph: mph, kph: kph kmh, knot: knot, dollar: dollar usd buck,
cent: cent, euro: euro, sterling: sterling, celsius: celsius, fahrenheit: fahrenheit,
degree: degree deg, rad: radian rad, rpm: rpm, ohm: \Omega, atm: atm
"""
_PREFIXES = {
    "T": 12, "G": 9, "M": 6, "k": 3, "d": -1, "c": -2, "m": -3, "u": -6, "\\mu": -6, "n": -9,
    "p": -12,
}  # fmt: skip
_LONG_PREFIXES = {
    "tera": 12, "giga": 9, "mega": 6, "kilo": 3, "hecto": 2, "deci": -1, "centi": -2,
    "milli": -3, "micro": -6, "nano": -9, "pico": -12,
}  # fmt: skip
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
_FACTOR = re.compile(
    r"\s*(?P<sign>[/*]?)\s*(?P<before>(?:(?:square|sq|cubic|cu)(?![A-Za-z])\s*)*)"
    r"(?:(?P<name>\\?[A-Za-z]+)|\((?P<inner>[^()]+)\))\s*(?:(?P<behind>squared|cubed)(?![A-Za-z])"
    r"|(?P<marks>(?:[\^-][\^\s-]*(?P<open>\(\s*-?\s*)?)?)(?P<digits>\d+)(?(open)\s*\)))?"
)


def _times(left: Unit, right: Unit, exponent: int) -> Unit:
    powers = dict(left.dimension)
    for base, power in right.dimension:
        powers[base] = powers.get(base, 0) + power * exponent
    kept = tuple(sorted((base, power) for base, power in powers.items() if power))
    return Unit(kept, left.scale * right.scale**exponent)


ONE = Unit((), Fraction(1))


def _spellings(table: str) -> list[tuple[str, str]]:
    """(spelling, unit)."""
    rows = [entry.split(":") for entry in table.split(",")]
    return [(name, unit.strip()) for unit, names in rows for name in names.split()]


def _table() -> dict[str, Unit]:
    """Every spelling with its unit; long names in lower case."""
    known = {name: Unit(((name, 1),), Fraction(1)) for name in (*_BASES.split(), "degree")}
    for entry in _DEFINITIONS.split(";"):
        name, _, definition = entry.strip().partition(" = ")
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
    for name, symbol in _spellings(_LONG):
        for prefix, shift in {"": 0, **_LONG_PREFIXES}.items():
            unit = known[symbol]
            found[prefix + name] = unit._replace(scale=unit.scale * Fraction(10) ** shift)
    found |= {name: known[symbol] for name, symbol in _spellings(_OTHER)}
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
    text = re.sub(r"[{}.]", " ", text).replace(" per ", " / ").rstrip()
    total, position = ONE, 0
    while position < len(text):
        match = _FACTOR.match(text, position)
        if match is None or (match["sign"] == "*" and not position):
            return None
        unit = _find(match["name"]) if match["name"] else read_unit(match["inner"])
        if unit is None:
            return None
        power = int(match["digits"] or _POWERS.get(match["behind"], 1))
        power *= math.prod(_POWERS[word] for word in match["before"].split())
        if power > MAX_EXPONENT:
            return None
        is_inverse = (match["sign"] == "/") != ("-" in (match["marks"] or ""))
        total, position = _times(total, unit, -power if is_inverse else power), match.end()
    return total if position else None
