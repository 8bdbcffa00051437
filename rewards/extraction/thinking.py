"""The part of a completion that is graded: everything outside the thinking, up to the end token.

Thinking is the text between a pair of TAGS, before a closing tag whose opening tag was part of the
prompt, or after an opening tag that was never closed. In a harmony transcript only the final
channel counts. A tag in quotation marks or backticks is mentioned, not used.
"""

from __future__ import annotations

import functools
import re

# A single word stands for <word> and </word>, in any case; a pair is (opening, closing) text.
TAGS: tuple[tuple[str, str] | str, ...] = (
    *"think thinking thought thoughts reason reasoning scratchpad analysis reflection".split(),
    *("inner_monologue", "seed:think", "mm:think"),
    *(("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"), ("<|channel>thought", "<channel|>")),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
# </thinking> also closes <think>, and so on: models mix them.
_ALIASES = {"thinking": "think", "thoughts": "thought", "reasoning": "reason"}

_END_TOKEN = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|eom_id|end_of_text|end|return|start_header_id)\|>"
    r"|</s>|<eos>|<end_of_turn>|<｜end▁of▁sentence｜>"
)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]{0,80}(?:<\|constrain\|>\w*)?\s*<\|message\|>")
_MESSAGE_END = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
# The same after decoding without special tokens: "analysisWe add.assistantfinalIt is 5."
_BARE_ANALYSIS = re.compile(r"\s*analysis(?=[A-Z])")
_BARE_FINAL = "assistantfinal"
_QUOTES = "`'\"‘“"

ExtraTags = tuple[tuple[str, str], ...]


def after_thinking(completion: str, extra_tags: ExtraTags = ()) -> str | None:
    """The graded part; None if there is none, for example if the thinking never ended.

    `extra_tags`: additional (opening, closing) pairs of literal text.
    """
    text: str | None = completion
    may_have_tags = "<" in completion
    if (may_have_tags and "<|channel|>" in completion) or completion.lstrip()[:8] == "analysis":
        text = _final_channel(completion)
    may_have_tags = may_have_tags or "◁" in completion or bool(extra_tags)
    may_have_tags = may_have_tags or ("[" in completion and "THINK]" in completion.upper())
    if text is not None and may_have_tags:
        text = _outside(text, extra_tags)
        token = _END_TOKEN.search(text)
        text = text if token is None else text[: token.start()]
        if not text.strip():
            return None
    return text


def _final_channel(text: str) -> str | None:
    """The last message of the channel 'final'."""
    if "<|channel|>" not in text:
        if _BARE_ANALYSIS.match(text) is None:
            return text
        _, found, rest = text.rpartition(_BARE_FINAL)
        return rest if found else None
    finals = [match for match in _CHANNEL.finditer(text) if match[1].lower() == "final"]
    if not finals:
        return None
    start = finals[-1].end()
    end = _MESSAGE_END.search(text, start)
    return text[start : end.start() if end is not None else len(text)]


def check_tags(tags: ExtraTags) -> None:
    """Raises ValueError for a tag that is too short to be distinct from normal text."""
    for pair in tags:
        if len(pair) != 2 or pair[0] == pair[1] or any(len(tag.strip()) < 3 for tag in pair):
            raise ValueError(
                f"thinking tags {list(pair)!r}: give different opening and closing tags of "
                "at least 3 characters each, such as ['<plan>', '</plan>']"
            )


@functools.lru_cache(maxsize=16)
def _patterns(extra_tags: ExtraTags) -> tuple[re.Pattern[str], dict[str, str]]:
    """One pattern for all tags, and the kind of each literal tag ("+kind" opens, "-kind" closes).

    The pattern begins with a character class, which makes the search fast.
    """
    words = [tag for tag in TAGS if isinstance(tag, str)]
    pairs = [tag for tag in (*TAGS, *extra_tags) if not isinstance(tag, str)]
    kinds: dict[str, str] = {}
    for opening, closing in pairs:
        kinds.setdefault(opening.lower(), f"+{opening.lower()}")
        kinds.setdefault(closing.lower(), f"-{opening.lower()}")
    firsts = {"<"} | {case for tag in kinds for case in (tag[0].lower(), tag[0].upper())}
    literal = "|".join(
        rf"(?<={re.escape(tag[0])}){re.escape(tag[1:])}"
        for tag in sorted(kinds, key=len, reverse=True)
    )
    named = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    pattern = (
        f"[{re.escape(''.join(sorted(firsts)))}]"
        rf"(?i:(?<=<)(?P<slash>/?)(?P<word>{named})(?:\s[^<>]{{0,100}})?>|(?:{literal}))"
    )
    return re.compile(pattern), kinds


def _outside(text: str, extra_tags: ExtraTags) -> str:
    """The text outside the thinking. Within a block only its own closing tag counts."""
    pattern, kinds = _patterns(extra_tags)
    kept: list[str] = []
    inside: str | None = None
    start = 0
    for match in pattern.finditer(text):
        before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
        if before and after and before in _QUOTES and after in "`'\"’”":
            continue
        if match["word"] is not None:
            word = match["word"].lower()
            is_opening, kind = not match["slash"], _ALIASES.get(word, word)
        else:
            signed = kinds[match.group().lower()]
            is_opening, kind = signed[0] == "+", signed[1:]
        if inside is None and is_opening:
            kept.append(text[start : match.start()])
            inside = kind
        elif not is_opening and inside in (None, kind):
            if inside is None:
                kept.clear()  # the opening tag was part of the prompt
            inside, start = None, match.end()
    if inside is None:
        kept.append(text[start:])
    return "\n\n".join(part for part in kept if part.strip())
