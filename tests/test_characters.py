"""Accidents in texts are found, and nothing is found in texts without any."""

import pytest

from dpo_lightning.data.characters import languages, oddities

#: What is odd -> a text that has it.
EXAMPLES = {
    "NUL": "a\0b",
    "control": "a\x1bb",
    "replacement": "a\ufffdb",
    "UTF-8 that was read as Latin-1": "caf\u00c3\u00a9",
    "byte order mark": "\ufeffa",
    "invisible": "a\u200bb",
    "HTML entities": "a &amp; b",
    "HTML tags": "a<br/>b",
    "carriage returns": "a\r\nb",
    "no-break spaces": "a\u00a0b",
    "private use": "a\ue000b",
    "ten times": "aaaaaaaaaaaa",
}

#: Texts in which there is nothing odd.
CLEAN = [
    "An electrician repairs wires.\n\n\tReally?",
    "Ein schöner Tag, naïve café, Ñandú.",
    "漢字とかな。",
    "Привет",
    "😀 👩\u200d👩 e\u0301",
    "if a < b and b > c: x = a & b  # ----------------",
    "....................",
]


@pytest.mark.parametrize("what", EXAMPLES)
def test_an_accident_is_found_in_the_text_that_has_it(what: str) -> None:
    found = oddities({3: CLEAN[0], 7: EXAMPLES[what], 9: CLEAN[2]})
    assert [(what in odd.what, odd.texts, odd.first) for odd in found] == [(True, 1, [7])]


def test_nothing_is_found_in_clean_texts() -> None:
    assert oddities(dict(enumerate(CLEAN))) == []


def test_texts_are_counted_and_the_first_are_named() -> None:
    [found] = oddities({number: "a\r\n" if number % 2 else "a" for number in range(40)}, named=3)
    assert (found.texts, found.first) == (20, [1, 3, 5])


def test_languages_are_told_and_what_is_too_short_is_not() -> None:
    texts = [
        "The weather is nice today and we are going to the beach with our friends.",
        "Das Wetter ist heute schön und wir gehen mit unseren Freunden an den Strand.",
        "今天天气很好,我们要和朋友们一起去海滩玩,然后一起吃晚饭。",
        "What should I cook for dinner tonight if I only have rice and eggs?",
        "hm",
    ]
    assert languages(texts) == {"en": 0.4, "de": 0.2, "zh": 0.2, "?": 0.2}
