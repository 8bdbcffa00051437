r"""Normalise the spelling of an answer before it is tokenised: Unicode, LaTeX spacing, wrappers.

Only unambiguous damage is repaired: a form feed before "rac" was `\f`rac, a doubled backslash
before a command was an escaped one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from rewards.parsing.nodes import MAX_CHARS, LimitExceeded, ParseError

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₖᵢₘ", "0123456789+-=()nkim")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ]+")
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₖᵢₘ]+")
_CIRCLED_RUN = re.compile("[①-⑳]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")
_IGNORED = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad\u2061-\u2064]")
_BIDI_OVERRIDE = re.compile("[\u202a-\u202e\u2066-\u2069]")
_UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "⋅": r"\cdot ",
        "·": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "∗": r"\cdot ", "÷": "/", "⁄": "/",
        "≤": r"\le ", "⩽": r"\le ", "≦": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≧": r"\ge ",
        "≠": r"\ne ", "≈": r"\approx ", "≃": r"\approx ", "∞": r"\infty ", "π": r"\pi ",
        "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
        "∉": r"\notin ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "º": r"^\circ ",
        "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
        "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ",
        "→": r"\to ", "∠": r"\angle ", "△": r"\triangle ", "′": "'", "″": "''", "’": "'",
        "‘": "'", "“": '"', "”": '"', "∣": "|", "∖": r"\setminus ", "α": r"\alpha ",
        "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "θ": r"\theta ",
        "λ": r"\lambda ", "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ", "φ": r"\phi ",
        "ϕ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ", "Ω": r"\Omega ", "τ": r"\tau ",
        "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ",
        "⟩": r"\rangle ", "…": r"\ldots ", "⋯": r"\cdots ", "、": ",", "。": ".", "∧": r"\land ",
        "∨": r"\lor ", "或": r" or ", "和": " and ", "且": " and ", "与": " and ", "及": " and ",
    }
)  # fmt: skip

# Commands whose first letters were read as an escape sequence: \f, \t, \b, \r, \a, \v, \n.
_EATEN = [
    ("\x0c", re.compile(r"\x0c(?=rac|lat|orall)"), r"\\f"),
    ("\t", re.compile(r"\t(?=ext|imes|heta|an\b|frac|au\b|o\b|riangle)"), r"\\t"),
    ("\x08", re.compile(r"\x08(?=oxed|inom|eta\b|egin|ar\b|ig)"), r"\\b"),
    ("\r", re.compile(r"\r(?=ight|ho\b|angle|floor|ceil)"), r"\\r"),
    ("\x07", re.compile(r"\x07(?=lpha|rc|pprox|ngle)"), r"\\a"),
    ("\x0b", re.compile(r"\x0b(?=ec|ert)"), r"\\v"),
    ("\n", re.compile(r"\n(?=eq\b|otin\b)"), r"\\n"),
]
# The same, with the escape character dropped as well.
_LOST = [
    (re.compile(r"(?<![A-Za-z\\])rac(?=\{|\d)"), r"\\frac"),
    (re.compile(r"(?<![A-Za-z\\])ext(?:circ|degree)\b"), r"\\circ "),
    (re.compile(r"(?<![A-Za-z\\])ext(?:bf|it|rm)?(?=\{)"), r"\\text"),
    (re.compile(r"(?<=[\d} ])imes(?=[\d{\\ ])"), r"\\times "),
]
_DOUBLED = re.compile(
    r"(?<!\\)\\\\(?=(?:[bB]igg?[lrm]?|d?frac|tfrac|cfrac|sqrt|text|boxed|left|right|pi|cdot|times|begin|end|leq?|geq?"
    r"|neq?|in|infty|cup|cap|pm|circ|mathrm|mathbb|sin|cos|tan|ln|log|alpha|beta|theta|lambda)"
    r"(?![a-z])|[{}%$])"
)
_SIZING = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut"
    r"|mathopen|mathclose|mathbin|mathrel|middle|hfill|noindent|strut|null)(?![A-Za-z])\.?"
)
_BRACKET_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)\s*(?=[()\[\]|]|\\[{}|])")
_SIZING_DOT = re.compile(r"\\(?:left|right|middle)\s*\.")
_ROW_SPACE = re.compile(r"\\\\\s*\[-?[\d.]+\s*[a-z]+\]")
_HORIZONTAL = re.compile(
    r"\\(?:hspace\*?|vspace\*?|hskip|kern|phantom|hphantom|vphantom|label|tag\*?|color)\s*\{[^{}]*\}"
)
_TEX_THOUSANDS = re.compile(
    r"(?<=\d)(?:\s*\{\s*,\s*\}|,\s*\\!|\\,|\\ |\\;|\\:|\\thinspace)\s*(?=\d{3}(?!\d))"
)
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,/])\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?![\d])")
_SPACES = re.compile(r"\\[,;:!> ]|\\quad|\\qquad|\\enspace|\\thinspace|\\newline|~|&nbsp;")
_DISPLAY = re.compile(
    r"\\(?:begin|end)\{(?:equation|align|aligned|gather|split|math|displaymath)\*?\}"
)
_LEADING = re.compile(
    r"^(?:\s|=(?!=)|:|\\(?:approx|Rightarrow|implies|rightarrow|to|therefore|sim|quad)(?![A-Za-z]))+"
)
# ]a, b[ for (a, b), only if no other reading of the brackets is possible.
_OUTWARD = re.compile(r"(?:^|\\cup\s*)\]|\[\s*(?:$|\\cup)")
_PIECE = re.compile(r"^([\[\](])([^\[\]]+,[^\[\]]+)([\[\])])$")
_MATH_DELIMITER = re.compile(r"\\[()\[\]]")


def clean(text: str) -> str:
    r"""The normalised text: ``clean("−½ \\left(x²\\right)")`` is ``"-\frac{1}{2} (x^{2})"``.

    Raises LimitExceeded if the text is too long, and ParseError if it contains NUL, surrogates or
    characters that change the displayed order.
    """
    if len(text) > MAX_CHARS:
        raise LimitExceeded
    if not text.isascii():
        text = _to_ascii(text)
    for character, pattern, replacement in _EATEN:
        if character in text:
            text = pattern.sub(replacement, text)
    if "rac" in text or "ext" in text or "imes" in text:
        for pattern, replacement in _LOST:
            text = pattern.sub(replacement, text)
    if "\x00" in text:
        raise ParseError
    if "{" in text or "\\" in text:
        text = _TEX_THOUSANDS.sub("", text)
    if "\\" in text:
        text = _simplify_latex(text)
    if "&" in text:
        text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    text = _SPACED_THOUSANDS.sub(lambda match: re.sub(r"\s", "", match.group()), text)
    for hint, pattern, rewritten in _REWRITTEN:
        if hint in text:
            text = pattern.sub(rewritten, text)
    if "[" in text and _OUTWARD.search(text):
        text = _outward_brackets(text)
    text = _LEADING.sub("", text.strip(' \t\r\n"`'))
    if text.startswith("**"):
        text = text.strip("*")
    return text.rstrip("\\.,;: ").strip()


def _to_ascii(text: str) -> str:
    if _BIDI_OVERRIDE.search(text):
        raise ParseError
    text = _IGNORED.sub("", text)
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    text = _CIRCLED_RUN.sub(lambda m: ",".join(str(ord(c) - 0x245F) for c in m.group()), text)
    text = _VULGAR.sub(_vulgar_fraction, text)
    text = text.translate(_UNICODE)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_UNICODE)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ParseError
    return text


def _vulgar_fraction(match: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", match.group()).partition("⁄")
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def _html_tag(match: re.Match[str]) -> str:
    is_end, name = match[1] == "/", match[2].lower()
    if name in ("sup", "sub"):
        return "}" if is_end else ("^{" if name == "sup" else "_{")
    return " "


def _to_24_hours(match: re.Match[str]) -> str:
    hour = int(match[1]) % 12 + (12 if match[3] in "pP" else 0)
    return f"{hour}:{match[2]}"


_GLUED = re.compile(r"(?<=[\d)}])(or|and)(?=[A-Z(\d\\-])")
# (a text that every match contains and that is faster to find, pattern, replacement)
_REWRITTEN: tuple[tuple[str, re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    ("<", re.compile(r"<(/?)(sup|sub|b|i|em|strong|br|p)\s*/?>", re.IGNORECASE), _html_tag),
    (
        ":",
        re.compile(r"\b(0?[1-9]|1[0-2]):([0-5]\d)\s*(?:\\text\{)?\s*([AaPp])\.?\s*[Mm]\b\.?\}?"),
        _to_24_hours,
    ),
    ("or", _GLUED, r" \1 "),
    ("and", _GLUED, r" \1 "),
    # twenty-one; 42 sq. cm
    ("ty-", re.compile(r"\b((?:twen|thir|for|fif|six|seven|eigh|nine)ty)-(?=[a-z])", re.I), r"\1 "),
    ("sq", re.compile(r"(?<=[\d\s{])sq\b(?:\.\s*|\s+)(?=[A-Za-z])"), "square "),
    ("cu", re.compile(r"(?<=[\d\s{])cu\b(?:\.\s*|\s+)(?=[A-Za-z])"), "cubic "),
    ("+/-", re.compile(r"\+/-"), r"\\pm "),
    ("{}", re.compile(r"\{\}\s*(?=[\^_])"), ""),  # {}^{10}C_3
    ("10", re.compile(r"(?<=[\d.])\s*[xX]\s*(?=10\s*(?:\^|\*\*))"), r" \\times "),  # 1.5 x 10^3
    # The ellipsis of 1, 2, 3, ...; not that of 0.333...
    ("...", re.compile(r"(?<=,)\s*\.\.\."), r"\\ldots "),
)


def _outward_brackets(text: str) -> str:
    """Replace the outward brackets of each interval of a union by parentheses."""
    pieces = []
    for piece in text.split("\\cup"):
        match = _PIECE.match(piece.strip())
        if match is None:
            return text
        left = "(" if match[1] == "]" else match[1]
        right = ")" if match[3] == "[" else match[3]
        pieces.append(left + match[2] + right)
    return "\\cup ".join(pieces)


def _simplify_latex(text: str) -> str:
    text = _DOUBLED.sub(r"\\", text).replace('\\"', " ")
    if "\\begin" in text and _DISPLAY.search(text):
        text = _DISPLAY.sub(" ", text).replace("&", " ").replace("\\\\", ", ")
    text = _SIZING_DOT.sub(" ", text)
    text = _BRACKET_SIZE.sub("", text)
    text = _SIZING.sub(" ", text)
    text = _ROW_SPACE.sub(r"\\\\ ", text)
    text = _HORIZONTAL.sub(" ", text)
    text = text.replace("\\\\", "\x1f")  # a row break is not a spacing command
    text = _SPACES.sub(" ", text)
    text = _MATH_DELIMITER.sub("$", text)
    return text.replace("\x1f", "\\\\")
