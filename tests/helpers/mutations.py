"""Small changes to an answer that change its value."""

from __future__ import annotations

import random
import re

_FUNCTIONS = {"sin": "cos", "cos": "sin", "tan": "cot", "ln": "exp", "log": "sin"}
_UNITS = {"cm": "mm", "m": "km", "inches": "feet", "feet": "inches", "hours": "minutes"}
_UNITS |= {"minutes": "hours", "km/h": "m/s", "kg": "g", "dollars": "cents", "apples": "pears"}
_BRACKETS = {"(": "[", "[": "(", ")": "]", "]": ")"}
_LETTERS = "abcdghknpqrtuvwxyz"


def change_digit(text: str, rng: random.Random) -> str | None:
    """Replace one digit."""
    places = [place for place, letter in enumerate(text) if letter.isdigit()]
    if not places:
        return None
    place = rng.choice(places)
    digit = rng.choice([digit for digit in "123456789" if digit != text[place]])
    return text[:place] + digit + text[place + 1 :]


def change_sign(text: str, rng: random.Random) -> str | None:
    """Replace a plus by a minus, or the reverse; without either, negate."""
    places = [place for place, letter in enumerate(text) if letter in "+-"]
    if not places:
        return f"-{text}" if re.match(r"[\\\d(a-z]", text) else None
    place = rng.choice(places)
    return text[:place] + ("-" if text[place] == "+" else "+") + text[place + 1 :]


def change_bracket(text: str, rng: random.Random) -> str | None:
    """Open or close one end of a text that looks like an interval."""
    match = re.fullmatch(r"(?:\\left)?[(\[][^()\[\],]+,[^()\[\],]+(?:\\right)?[)\]]", text)
    if match is None:
        return None
    place = rng.choice([place for place, letter in enumerate(text) if letter in _BRACKETS])
    return text[:place] + _BRACKETS[text[place]] + text[place + 1 :]


def move_brace(text: str, rng: random.Random) -> str | None:
    """Move a closing brace past the next operand, or the last operand out of the braces."""
    moves = [
        text[: match.start()] + match[1] + "}" + text[match.end() :]
        for match in re.finditer(r"\}(\s*[-+]\s*[0-9a-z]+|[a-z])", text)
    ]
    moves += [
        text[: match.start()] + "}" + match[1] + text[match.end() :]
        for match in re.finditer(r"([-+][0-9a-z]+)\}", text)
        if match.start() and text[match.start() - 1] not in "{^_"
    ]
    return rng.choice(moves) if moves else None


def change_function(text: str, rng: random.Random) -> str | None:
    """Replace the sine by the cosine, and so on."""
    names = [name for name in _FUNCTIONS if f"\\{name}" in text]
    if not names:
        return None
    name = rng.choice(names)
    return text.replace(f"\\{name}", f"\\{_FUNCTIONS[name]}", 1)


def change_exponent(text: str, rng: random.Random) -> str | None:
    """Increase one exponent by one."""
    matches = list(re.finditer(r"\^(?:\{(-?\d+)\}|(\d))(?!\d*\\circ)", text))
    if not matches:
        return None
    match = rng.choice(matches)
    return f"{text[: match.start()]}^{{{int(match[1] or match[2]) + 1}}}{text[match.end() :]}"


def change_unit(text: str, rng: random.Random) -> str | None:
    """Replace a unit."""
    found = [
        unit for unit in _UNITS if re.search(rf"\d\s*(?:\\text\{{)?\s*{re.escape(unit)}\b", text)
    ]
    if not found:
        return None
    unit = rng.choice(found)
    return re.sub(rf"\b{re.escape(unit)}\b", _UNITS[unit], text, count=1)


def change_name(text: str, rng: random.Random) -> str | None:
    """Replace one letter by one that does not occur."""
    matches = list(re.finditer(r"(?<![A-Za-z\\{])[a-dgh k-np-z](?![A-Za-z(])", text))
    matches = [match for match in matches if match[0].isalpha()]
    if not matches:
        return None
    match = rng.choice(matches)
    others = [letter for letter in _LETTERS if letter not in text]
    if not others:
        return None
    return text[: match.start()] + rng.choice(others) + text[match.end() :]


def change_modulus(text: str, rng: random.Random) -> str | None:
    """Increase the modulus by one."""
    match = re.search(r"(\\pmod\s*\{?)(\d+)", text)
    return None if match is None else text.replace(match[0], f"{match[1]}{int(match[2]) + 1}", 1)


MUTATIONS = {
    "digit": change_digit,
    "sign": change_sign,
    "bracket": change_bracket,
    "brace": move_brace,
    "function": change_function,
    "exponent": change_exponent,
    "unit": change_unit,
    "name": change_name,
    "modulus": change_modulus,
}
