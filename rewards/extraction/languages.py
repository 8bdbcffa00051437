"""Tables for other languages than English: how an answer is announced and its sentence ends.

English is handled by `announcements`.
"""

from __future__ import annotations

import re

# Labels, and the words allowed between a label and the answer (a colon always is). Lower case.
_TABLE = """
# Chinese, Japanese, Korean
答案|正确选项|正確選項|正确的选项: 应该是|应该为|应该选|应为|应是|应选|就是|等于|是|为|選|选
故选|本题选|题选|则选|我选|应选|因此选|所以选|故選|應選|因此選|所以選|选择|選擇: 择
最终结果|最终结果: 是|为|等于
答え|解答|正解: は|が
答:
정답|답|답변: 은|는|이
# Romance languages
respuesta|opción correcta|opcion correcta|resultado final: es|será|sería
resposta|opção correta|alternativa correta: é|e|será|seria|és
réponse|bonne option|résultat final: est|vaut|serait
risposta|opzione corretta|risultato finale: è|e'|sarà
răspuns|răspunsul|raspunsul: este|e
# Germanic and Nordic languages, Finnish
antwort|endergebnis: lautet|ist|beträgt|wäre
antwoord|eindantwoord: is|luidt
svar|svaret: är|er|blir
vastaus: on
# Slavic languages, Hungarian, Greek
ответ|ответом|верный вариант|правильный вариант: является|равен|это|будет
відповідь: є|це|дорівнює
отговор|отговорът: е
odpowiedź|odpowiedz|odpowiedzią: to|jest|brzmi|wynosi
odpověď|odpoveď: je|zní|znie
odgovor: je
válasz: a|az
απάντηση: είναι
# Turkish, Vietnamese, Indonesian, Swahili
cevap|cevabı|yanıt|doğru seçenek:
đáp án|đáp số|trả lời|kết quả cuối cùng: là
jawaban|jawabannya|jawapan|jawapannya: adalah|ialah|yaitu
jibu: ni
# Indic languages, Thai
उत्तर|जवाब|सही विकल्प: है|हैं|होगा
উত্তর: হল|হলো|হবে
பதில்|விடை:
సమాధానం|జవాబు:
คำตอบ: คือ
# Arabic, Persian, Urdu, Hebrew
جواب|إجابة|اجابة: هو|هي
پاسخ: برابر با|برابر است با
תשובה: היא|הוא
"""

# Ends of a sentence that are not part of the answer.
PARTICLES = re.compile(
    r"\s*(?:です|でした|である|となります|になります|だ|입니다|이다|이에요|예요|है|हैं|होगा|است|می‌باشد|'[td][iıuü]r)[\s.!]*$"
)
# Counters that follow a number without a space.
COUNTERS = re.compile(
    r"(?<=[\d}$)])\s*(?:个|個|只|隻|元|块|人|名|位|本|页|天|岁|歳|次|种|条|张|辆|棵|朵|颗|头|枝|支|件"
    r"|円|枚|回|匹|台|点|개|명|원|마리|권|번)$"
)
SENTENCE_END = re.compile(r"[。！？।॥؟]")
# Words after a number, such as its unit, but not 'or more', 'thousand' and the like.
FOREIGN_TAIL = re.compile(
    r"(?<=\d)(?!.*(?:以上|以下|以内|或|万|千|百|亿|億|倍|多|余|未満|이상|이하|만|억|천|或))"
    r"(?!.*\b(?:или|больше|меньше|тысяч\w*|млн|миллион\w*|más|menos|mil|millones|ou|oder|mehr"
    r"|weniger|plus|moins|mille)\b)(?=.*[^\W\d_\x00-\x7f])\s?(?:[^\W\d_]+\.?\s?){1,3}$"
)
_UNSPACED = 0x2E80  # scripts above this write no spaces between words


def _is_unspaced(text: str) -> bool:
    return ord(text[0]) >= _UNSPACED or "\u0e00" <= text[0] <= "\u0e7f"


def _announcement(label: str, copulas: str) -> re.Pattern[str]:
    """The label, a few words, a copula or a colon, then the rest of the text in group "rest"."""
    if _is_unspaced(label):
        words, after_copula = r"[^\W\d]{0,6}?", ""
    else:
        words, after_copula = r"(?:\s[^\W\d]{1,20}){0,3}?", r"(?=[\s:：*_$\\(\d\"'“`-])"
    options = "|".join(re.escape(word) for word in copulas.split("|") if word)
    copula = rf"(?:{options}){after_copula}|" if options else ""
    return re.compile(
        rf"{re.escape(label)}{words}[\s*_\"'」』）)`]{{0,8}}"
        rf"(?:{copula}[:：=＝]|\s[—–]\s|(?=[\d$\\(（*-]|[A-J](?![A-Za-z])))"
        r"(?P<rest>.{1,2000})",
        re.IGNORECASE | re.DOTALL,
    )


# Lower-case label -> pattern of the whole announcement.
ANNOUNCEMENTS: dict[str, re.Pattern[str]] = {
    label: _announcement(label, copulas.strip())
    for labels, _, copulas in (line.partition(":") for line in _TABLE.splitlines())
    if labels and labels[0] != "#"
    for label in labels.split("|")
}
# Between a label and the answer: what follows is not the answer.
NEGATION = re.compile(
    r"不|非|没|ない|아니|нет|\b(?:no|not|nicht|kein\w*|pas|не|ні|non|niet|nie|não|inte|ikke|ej|tidak"
    r"|bukan|değil|không|नहीं|ليس|ليست|نیست|nu|ei|nem|δεν)\b"
)
ASCII_LABELS = tuple(label for label in ANNOUNCEMENTS if label.isascii())
ALL_LABELS = tuple(ANNOUNCEMENTS)


def starts_a_word(text: str, position: int) -> bool:
    """Does a word begin at `position`? Always true in scripts without spaces."""
    if _is_unspaced(text[position:]) or ord(text[position]) >= 0x0590:
        return True
    return position == 0 or not text[position - 1].isalpha()


# The zero of each script whose ten digits are consecutive.
_ZEROS = (
    0x0660, 0x06F0, 0x07C0, 0x0966, 0x09E6, 0x0A66, 0x0AE6, 0x0B66, 0x0BE6, 0x0C66, 0x0CE6, 0x0D66,
    0x0E50, 0x0ED0, 0x0F20, 0x1040, 0x17E0, 0x1810, 0xFF10,
)  # fmt: skip
_DIGITS: dict[int, str] = {zero + digit: str(digit) for zero in _ZEROS for digit in range(10)} | {
    ord("٫"): ".",
    ord("٬"): ",",
    ord("٪"): "%",
}
_HAS_DIGITS = re.compile("[" + "".join(chr(code) for code in _DIGITS) + "]")


def with_ascii_digits(text: str) -> str:
    """The text with the digits of other scripts as 0 to 9."""
    return text if text.isascii() or not _HAS_DIGITS.search(text) else text.translate(_DIGITS)
