"""Which languages a sample of texts is in, and which characters in it are likely to be accidents."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

#: Characters of a text by which its language is told, the fewest bytes, and the probability from which it is believed.
CHARACTERS, FEW, SURE = 600, 20, 0.9

#: What is odd -> how it is found: in texts that are ASCII alone, and in others.
ODD_ASCII: dict[str, str] = {
    "NUL and other control characters": r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]",
    "HTML entities, such as &amp;": r"&(?:amp|lt|gt|quot|nbsp|#\d{1,5});",
    "HTML tags": r"</?(?:p|br|div|span|a|b|i|em|strong|ul|li|code|pre)\b[^<>]{0,100}>",
    "carriage returns": r"\r",
    "a character ten times or more in a row": r"([^\s\-=_*.#~])\1{9,}",
}
ODD_OTHERS: dict[str, str] = {
    "replacement character U+FFFD: bytes that were lost": "\ufffd",
    "UTF-8 that was read as Latin-1, such as Ã©": r"Ã[\u0080-\u00bf]|â€[\u0098-\u009d\u2122œ]",
    "byte order mark U+FEFF": "\ufeff",
    "invisible characters: zero width, direction": r"[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064]",
    "no-break spaces": r"[\u00a0\u202f]",
    "private use characters": "[\ue000-\uf8ff\U000f0000-\U0010fffd]",
}


@dataclass(frozen=True)
class Oddity:
    """One kind of odd characters: in how many of the texts, and in which first."""

    what: str
    texts: int
    first: list[int]


@cache
def identifier() -> LanguageIdentifier:
    """The classifier: a naive Bayes over byte n-grams (Lui and Baldwin 2012), unpacked once."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def languages(texts: Sequence[str]) -> dict[str, float]:
    """ISO 639-1 code -> share of the texts by their first characters; `?` is what is too short or unclear."""
    classify = identifier().classify
    counted: Counter[str] = Counter()
    for text in texts:
        start = text[:CHARACTERS].strip()
        code, probability = classify(start) if len(start.encode()) >= FEW else ("?", 1.0)
        counted[code if probability >= SURE else "?"] += 1
    return {code: count / len(texts) for code, count in counted.most_common()}


def oddities(texts: Mapping[int, str], named: int = 5) -> list[Oddity]:
    """Each kind of odd characters that is in a text, by the texts' numbers."""
    others = {number: text for number, text in texts.items() if not text.isascii()}
    found = []
    for patterns, some in ((ODD_ASCII, texts), (ODD_OTHERS, others)):
        for what, pattern in patterns.items():
            search = re.compile(pattern).search
            places = [number for number, text in some.items() if search(text)]
            if places:
                found.append(Oddity(what, len(places), places[:named]))
    return found
