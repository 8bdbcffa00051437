"""Tokeniser for cleaned answers; enforces size limits."""

from __future__ import annotations

import re
from typing import NamedTuple

from rewards.parsing.nodes import MAX_DIGITS, MAX_NESTING, MAX_TOKENS, LimitExceeded, ParseError
from rewards.parsing.units import UNIT_WORDS, is_unit, read_unit
from rewards.parsing.vocabulary import (
    COMMANDS,
    FUNCTIONS,
    IGNORED_COMMANDS,
    LETTER_COMMANDS,
    TEXT_COMMANDS,
    WORDS,
)


class Token(NamedTuple):
    """`kind`: num, sym, const, func, cmd, op, word, text, env, open, close, end.

    `is_spaced`: preceded by white space.
    """

    kind: str
    text: str
    is_spaced: bool = False


_TOKEN = re.compile(
    r"""(?P<space>\s+|\$)
    |(?P<num>\d+\.(?=\s*\\(?:overline|dot)(?![A-Za-z]))|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?
        (?:[eE][-+]?\d{1,6}(?![A-Za-z\d]))?|\.\d+(?:[eE][-+]?\d{1,6}(?![A-Za-z\d]))?)
    |(?P<env>\\(?:begin|end)\s*\{[A-Za-z*]+\}(?:\s*\{[lcr|\s]+\})?)
    |(?P<escaped>\\[{}|$%&\#_\\])
    |(?P<cmd>\\[A-Za-z]+\*?)
    |(?P<op><=|>=|=<|!=|==|->|=>|\*\*|:=|[-+*/^_=<>!|:;,'%~&?"`@\#€£¥])
    |(?P<open>[({\[])
    |(?P<close>[)}\]])
    |(?P<letters>[A-Za-z]+)
    |(?P<dots>\.\.\.)
    |(?P<dot>\.)
    """,
    re.VERBOSE,
)
_OPERATORS = {
    "<=": "<=", "=<": "<=", ">=": ">=", "!=": "!=", "==": "=", ":=": "=", "**": "^", "=>": "to",
    "->": "to", "*": "*",
}  # fmt: skip
_ESCAPED = {  # \# and \_ are ignored
    "\\{": ("open", "\\{"), "\\}": ("close", "\\}"), "\\%": ("op", "%"),
    "\\$": ("op", "currency"), "\\|": ("op", "|"), "\\\\": ("op", "row"), "\\&": ("word", "and"),
}  # fmt: skip


def tokenize(text: str) -> list[Token]:
    """Tokens of a cleaned text; the last one is of kind "end".

    Raises LimitExceeded (count, nesting, digits) and ParseError (a character out of place).
    """
    tokens: list[Token] = []
    position, is_spaced = 0, False
    brackets: list[str] = []
    size = len(text)
    while position < size:
        match = _TOKEN.match(text, position)
        if match is None:
            raise ParseError
        kind = match.lastgroup
        piece = match.group()
        position = match.end()
        if kind == "space":
            is_spaced = True
            continue
        if kind == "num":
            if len(piece) > MAX_DIGITS:
                raise LimitExceeded
            if "," in piece and brackets and brackets[-1] != "{":
                first, *others = piece.split(",")  # the point (3,500)
                tokens.append(Token("num", first, is_spaced))
                for number in others:
                    tokens += [Token("op", ","), Token("num", number)]
            else:
                tokens.append(Token("num", piece, is_spaced))
        elif kind == "letters":
            _split_letters(piece, tokens, is_spaced)
        elif kind == "cmd":
            position = _read_command(text, piece, position, tokens, is_spaced)
        elif kind == "escaped":
            if piece in _ESCAPED:
                tokens.append(Token(*_ESCAPED[piece], is_spaced))
            _track(piece, brackets)
        elif kind == "env":
            tokens.append(Token("env", piece.replace(" ", ""), is_spaced))
        elif kind == "op":
            tokens.append(Token("op", _OPERATORS.get(piece, piece), is_spaced))
        elif kind in ("open", "close"):
            _track(piece, brackets)
            tokens.append(Token(kind, piece, is_spaced))
        elif kind == "dots":
            tokens.append(Token("sym", "\\ldots", is_spaced))
        # A lone dot only ends a sentence.
        is_spaced = False
        if len(tokens) > MAX_TOKENS:
            raise LimitExceeded
    tokens.append(Token("end", "", is_spaced))
    return tokens


def _track(piece: str, brackets: list[str]) -> None:
    """Update the stack of open brackets."""
    if piece in ("(", "[", "{", "\\{"):
        brackets.append(piece)
        if len(brackets) > MAX_NESTING:
            raise LimitExceeded
    elif piece in (")", "]", "}", "\\}") and brackets:
        brackets.pop()


def _split_letters(piece: str, tokens: list[Token], is_spaced: bool) -> None:
    """Append a run of letters as a function, a word, a unit, or a product of symbols."""
    lowered = piece.lower()
    if piece in FUNCTIONS and not (piece == "min" and is_spaced and _follows_operand(tokens)):
        tokens.append(Token("func", FUNCTIONS[piece], is_spaced))
    elif lowered in ("pi", "infinity", "inf", "oo") and len(piece) > 1:
        name = "pi" if lowered == "pi" else "inf"
        tokens.append(Token("const", name, is_spaced))
    elif len(piece) == 1:
        tokens.append(Token("sym", piece, is_spaced))
    elif len(piece) >= 4 or _is_short_word(piece, tokens, is_spaced):
        if piece.startswith("sqrt"):  # sqrtx, sqrt3 without braces
            tokens.append(Token("cmd", "sqrt", is_spaced))
            _split_letters(piece[4:], tokens, False)
            return
        tokens.append(Token("word", piece, is_spaced))
    elif (
        piece in UNIT_WORDS
        and _follows_operand(tokens)
        or len(piece) == 3
        and re.search(r"[aeiou]", piece)
        and (is_spaced or piece.istitle())
    ):
        tokens.append(Token("word", piece, is_spaced))
    else:
        for offset, letter in enumerate(piece):
            tokens.append(Token("sym", letter, is_spaced and offset == 0))


def _is_short_word(piece: str, tokens: list[Token], is_spaced: bool) -> bool:
    """`x is 5` contains a word; `e^{-at^2}` and `aE(X) + bE(Y)` contain products of letters."""
    if piece.lower() not in WORDS or not (piece.islower() or piece.istitle()):
        return False
    if is_spaced or not tokens or _follows_operand(tokens):
        return True
    return tokens[-1].text == "/" and _follows_operand(tokens[:-1]) and is_unit(piece)  # 18/day


def _follows_operand(tokens: list[Token]) -> bool:
    """Can a unit follow, with or without braces (800{ml})?"""
    last = next((token for token in reversed(tokens) if token.text != "{"), None)
    if last is None:
        return False
    return last.kind in ("num", "close", "const") or last.text in ("square", "cubic")


def _read_command(
    text: str, piece: str, position: int, tokens: list[Token], is_spaced: bool
) -> int:
    r"""Append the tokens of a command; return the position after it and its text argument."""
    name = piece[1:].rstrip("*")
    if name in TEXT_COMMANDS:
        content, position = _read_braces(text, position)
        _read_text(name, content, tokens, is_spaced)
        return position
    if name not in COMMANDS and name not in LETTER_COMMANDS and name not in IGNORED_COMMANDS:
        # \quadx, \cdotx: a command and the letter after it.
        for length in range(len(name) - 1, 1, -1):
            if name[:length] in COMMANDS or name[:length] in IGNORED_COMMANDS:
                _read_known(name[:length], tokens, is_spaced)
                return position - len(piece) + 1 + length
        tokens.append(Token("sym", "\\" + name, is_spaced))
        return position
    _read_known(name, tokens, is_spaced)
    return position


def _read_known(name: str, tokens: list[Token], is_spaced: bool) -> None:
    if name in LETTER_COMMANDS:
        tokens.append(Token("sym", LETTER_COMMANDS[name], is_spaced))
    elif name in COMMANDS:
        kind, value = COMMANDS[name]
        tokens.append(Token(kind, value, is_spaced))


def _read_braces(text: str, position: int) -> tuple[str, int]:
    """Content of the braces at `position` (or the one character there), and the next position."""
    while position < len(text) and text[position] == " ":
        position += 1
    if position >= len(text):
        return "", position
    if text[position] != "{":
        return text[position], position + 1
    depth = 0
    for index in range(position, len(text)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return text[position + 1 : index], index + 1
    return text[position + 1 :], len(text)


_UNIT = re.compile(r"[A-Za-z]{1,4}(?:\^\{?\d\}?)?(?:[/ ][A-Za-z]{1,4}(?:\^\{?\d\}?)?){0,3}")
_FORMULA = re.compile(r"[\d\\$^_=+*/<>{}]")


def _read_text(command: str, content: str, tokens: list[Token], is_spaced: bool) -> None:
    r"""Append the content of \text{...}: words, but maths for \mathrm{e}, \text{sin}, formulas."""
    stripped = content.strip()
    if command == "mathbb":
        tokens.append(Token("sym", f"\\mathbb{{{stripped}}}", is_spaced))
        return
    is_roman = command not in ("text", "mbox", "textbf", "textnormal", "textit", "hbox", "textrm")
    if _UNIT.fullmatch(stripped) and read_unit(stripped) and _follows_operand(tokens):
        for piece in re.findall(r"[A-Za-z]+|\d+|[\^/]", stripped):
            kind = "word" if piece.isalpha() else "num" if piece.isdigit() else "op"
            tokens.append(Token(kind, piece))
        return
    if stripped in FUNCTIONS:
        tokens.append(Token("func", FUNCTIONS[stripped], is_spaced))
        return
    if _FORMULA.search(stripped) or (is_roman and len(stripped) == 1):
        if len(tokens) > MAX_TOKENS:
            raise LimitExceeded
        inner = tokenize(stripped)[:-1]
        if command in ("text", "textbf", "mbox", "textnormal", "textit", "textrm"):
            inner = [t._replace(kind="word") if t.kind == "sym" else t for t in inner]
        tokens.extend(inner)
        return
    words = re.findall(r"[A-Za-z]+(?:'[a-z]+)?|[,;()]|[^\sA-Za-z]", stripped)
    for index, word in enumerate(words):
        kind = "word" if word[0].isalpha() else "op"
        if word in "()":
            kind = "open" if word == "(" else "close"
        if kind == "op" and word not in ",;:'-%/":
            continue
        if kind == "word" and len(word) == 1:
            kind = "text"  # \text{e} is a name, never Euler's number
        tokens.append(Token(kind, word, is_spaced or index > 0))
