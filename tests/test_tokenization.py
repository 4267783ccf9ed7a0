"""Ids spell the text, no answer character is in the prompt, EOS and BOS stand once, and cuts do what they say.

The oracle is `spell`, which reads ids off the vocabulary without the tokenizer; for cuts it is the same pair uncut.
"""

import re
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dpo_lightning.data.preference import Preference, RowFault
from dpo_lightning.data.tokenization import Encoded, PairTokenizer, TooLong, Truncation
from tests.tokenizers_built import (
    BOS,
    BUILDS,
    BYTE_LEVEL,
    GPT_EOS,
    SENTENCEPIECE,
    adds_both,
    byte_level,
    byte_level_adds_both,
    no_eos,
    pad_is_eos,
    plain_text,
    sentencepiece,
    spell,
)

few = settings(max_examples=50, deadline=None)

LONG = 1_000_000

#: Bytes of the longest character, and so the most byte tokens that can be given up to end with a whole one.
CHARACTER = 4

TOKENIZERS = {name: build() for name, build in BUILDS.items()}

#: What is likely to go wrong at a boundary: halves of merges, all kinds of white space, many bytes, combining marks.
PIECES = ["Hello", "Hel", "lo", "world", " world", "Human:", "a", ".", "é", "e\u0301", "漢字", "😀", "\ufffd"]
PIECES += ["👩\u200d👩", " ", "  ", "\n", "\n\n", "\r\n", "\r", "\t", "\0", "\u00a0", "\u2028", "\u3000"]
BLANKS = " \r\n\t\0\u00a0\u2028\u3000"

pieced = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
texts = st.one_of(pieced, st.text(max_size=20))
answers = texts.filter(bool)

#: What a SentencePiece-like tokenizer holds: not "▁", its sign for a space; and it may swallow a space at the start.
readable = st.one_of(pieced, st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=20))
unspaced = readable.filter(lambda text: not text.startswith(" "))


def encode(
    tokenizer: PreTrainedTokenizerFast,
    preference: Preference,
    max_length: int = LONG,
    truncation: Truncation = "keep_end",
) -> Encoded | RowFault:
    [row] = PairTokenizer(tokenizer, max_length, truncation)([preference])
    return row


def encode_usable(
    tokenizer: PreTrainedTokenizerFast,
    preference: Preference,
    max_length: int = LONG,
    truncation: Truncation = "keep_end",
) -> Encoded:
    row = encode(tokenizer, preference, max_length, truncation)
    assert isinstance(row, Encoded), row
    return row


def texts_of(tokenizer: PreTrainedTokenizerFast, row: Encoded) -> tuple[str, str, str]:
    """Prompt without BOS and answers without EOS, each spelled from its own ids alone."""
    bos = PairTokenizer(tokenizer, LONG).prefix
    assert row.prompt[: len(bos)] == bos
    prompt = spell(tokenizer, row.prompt[len(bos) :], start=True)
    start = len(row.prompt) == len(bos)  # an answer to an empty prompt starts the text
    ends = [spell(tokenizer, ids[:-1], start) for ids in (row.chosen, row.rejected)]
    assert row.chosen[-1] == row.rejected[-1] == tokenizer.eos_token_id
    return prompt.decode(), ends[0].decode(), ends[1].decode()


# The text and the boundary


@pytest.mark.parametrize("name", BYTE_LEVEL)
@few
@given(prompt=texts, chosen=answers, rejected=answers)
def test_byte_level_ids_spell_prompt_and_answers_each_apart(name: str, prompt: str, chosen: str, rejected: str) -> None:
    assume(chosen != rejected)
    row = encode_usable(TOKENIZERS[name], Preference(prompt, chosen, rejected))
    assert texts_of(TOKENIZERS[name], row) == (prompt, chosen, rejected)


@pytest.mark.parametrize("name", SENTENCEPIECE)
@few
@given(prompt=unspaced, chosen=readable.filter(bool), rejected=readable.filter(bool))
def test_sentencepiece_ids_spell_prompt_and_answers_each_apart(
    name: str, prompt: str, chosen: str, rejected: str
) -> None:
    assume(chosen != rejected)
    assume(prompt or not (chosen.startswith(" ") or rejected.startswith(" ")))  # the answer is the start, then
    row = encode_usable(TOKENIZERS[name], Preference(prompt, chosen, rejected))
    assert texts_of(TOKENIZERS[name], row) == (prompt, chosen, rejected)


@pytest.mark.parametrize("name", ["byte_level", "joined", "sentencepiece", "metaspace", "adds_both"])
def test_any_two_blanks_may_meet_at_the_boundary(name: str) -> None:
    for before, after in product(BLANKS, BLANKS):
        preference = Preference(f"Hello{before}", f"{after}world", f"{after}a")
        row = encode_usable(TOKENIZERS[name], preference)
        assert texts_of(TOKENIZERS[name], row) == (preference.prompt, preference.chosen, preference.rejected)


@pytest.mark.parametrize("name", BUILDS)
def test_a_word_that_merges_over_the_boundary_stays_in_the_answer(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    joint = tokenizer.tokenize("Hello world")
    assert len(joint) == 2 and joint[1].endswith("world"), "the trap is not set"
    row = encode_usable(tokenizer, Preference("Hello ", "world", "woe"))
    assert texts_of(tokenizer, row) == ("Hello ", "world", "woe")
    assert row.boundary


@pytest.mark.parametrize("name", ["byte_level", "joined", "sentencepiece"])
@few
@given(prompt=unspaced.filter(bool), chosen=readable.filter(bool), rejected=readable.filter(bool))
@example(prompt="Hello ", chosen="world", rejected="a")  # one of them merges
@example(prompt="Hello ", chosen="a", rejected="world")
def test_the_ledger_is_told_exactly_where_the_joint_text_has_other_tokens(
    name: str, prompt: str, chosen: str, rejected: str
) -> None:
    assume(chosen != rejected)
    tokenizer = TOKENIZERS[name]
    row = encode_usable(tokenizer, Preference(prompt, chosen, rejected))
    joint = tokenizer([prompt + chosen, prompt + rejected], add_special_tokens=False).input_ids
    assert (row.boundary == "") == ([row.prompt + ids[:-1] for ids in (row.chosen, row.rejected)] == joint)


@pytest.mark.parametrize("name", BUILDS)
def test_the_prompts_ids_are_those_that_generation_starts_from(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for prompt in ("Hello ", "Hello", "a\n\n", "world  "):
        ids = tokenizer(prompt).input_ids
        without_eos = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
        assert encode_usable(tokenizer, Preference(prompt, "world", "a")).prompt == without_eos


def test_rows_are_encoded_alike_alone_and_among_others() -> None:
    preferences = [
        Preference("Hello ", "world", "a"),
        Preference("", "b", None),
        Preference("Hel", "lo", "l"),
        Preference("a " * 40, "b", "c"),
    ]
    encoder = PairTokenizer(TOKENIZERS["adds_both"], 20, "drop")
    alone = [encode(TOKENIZERS["adds_both"], preference, 20, "drop") for preference in preferences]
    assert list(map(str, encoder(preferences))) == list(map(str, alone))
    assert [type(row) for row in alone] == [Encoded, Encoded, Encoded, TooLong]
    assert encoder([]) == []


# EOS and BOS


@pytest.mark.parametrize("name", BUILDS)
def test_exactly_one_eos_stands_at_the_end_of_each_answer_and_none_before(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    row = encode_usable(tokenizer, Preference("Hello ", "world", " world."))
    for answer in (row.chosen, row.rejected):
        assert answer[-1] == tokenizer.eos_token_id
        assert (row.prompt + answer).count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("name", [name for name in BUILDS if name != "plain_text"])
def test_an_answer_that_ends_in_eos_gets_no_second(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    row = encode_usable(tokenizer, Preference("Hello", f" world{tokenizer.eos_token}", " a"))
    assert row.chosen == encode_usable(tokenizer, Preference("Hello", " world", " a")).chosen


def test_where_a_text_cannot_spell_eos_the_letters_stay_and_one_is_added() -> None:
    row = encode_usable(plain_text(), Preference("Hello", f"a{GPT_EOS}", "b"))
    assert spell(plain_text(), row.chosen[:-1]).decode() == f"a{GPT_EOS}"
    assert row.chosen.count(plain_text().eos_token_id) == 1


@pytest.mark.parametrize("build", [byte_level, sentencepiece])
def test_answers_that_differ_in_a_written_eos_alone_are_identical(build: Callable[[], PreTrainedTokenizerFast]) -> None:
    """Their ids are the same, so there is nothing to prefer."""
    tokenizer = build()
    fault = encode(tokenizer, Preference("Hello", " world", f" world{tokenizer.eos_token}"))
    assert isinstance(fault, RowFault) and "identical" in str(fault)


@pytest.mark.parametrize("name", BUILDS)
def test_an_answer_that_was_cut_has_no_eos_and_one_that_fits_keeps_its_own(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    row = encode_usable(tokenizer, Preference("a", "b" * 50, "c"), max_length=20)
    assert tokenizer.eos_token_id not in row.chosen
    assert row.rejected[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", BUILDS)
def test_eos_is_the_first_token_for_which_there_is_no_room(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    preference = Preference("a", "b" * 50, "c")
    whole = encode_usable(tokenizer, preference)
    length = len(whole.prompt) + len(whole.chosen)
    assert encode(tokenizer, preference, length) == whole
    cut = encode_usable(tokenizer, preference, length - 1)
    assert cut.chosen == whole.chosen[:-1] and "chosen" in cut.cut


def test_padding_with_eos_masks_no_eos() -> None:
    """The prompt may hold the token that also pads, and the answer must keep the one it ends with."""
    tokenizer = pad_is_eos()
    row = encode_usable(tokenizer, Preference(f"a{GPT_EOS}b", f"c{GPT_EOS}d", "e"))
    assert row.prompt.count(tokenizer.pad_token_id) == 1
    assert row.chosen.count(tokenizer.pad_token_id) == 2
    assert row == encode_usable(byte_level(), Preference(f"a{GPT_EOS}b", f"c{GPT_EOS}d", "e"))


def test_without_an_eos_token_the_text_comes_back_and_nothing_ends_it() -> None:
    """A tokenizer without any special token: its answers have no end that could be learned, which is said elsewhere."""
    tokenizer = no_eos()
    assert not tokenizer.all_special_tokens
    for texts in (("Hello ", "world", "a"), ("", "b", " c"), ("漢", "字", "😀"), ("a\n", "\nb", "\r\n")):
        row = encode_usable(tokenizer, Preference(*texts))
        spelled = tuple(spell(tokenizer, ids).decode() for ids in (row.prompt, row.chosen, row.rejected))
        assert spelled == texts and row.text == ""


@pytest.mark.parametrize("name", ["adds_bos", "adds_both", "byte_level_adds_both"])
@pytest.mark.parametrize("prompt", ["Hello", "", BOS, f"{BOS}Hello"])
def test_bos_stands_once_before_the_prompt_even_if_the_text_has_it_too(name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    row = encode_usable(tokenizer, Preference(prompt, "world", "a"))
    assert row.prompt[0] == tokenizer.bos_token_id
    assert (row.prompt + row.chosen + row.rejected).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", ["sentencepiece", "adds_eos", "byte_level"])
def test_a_tokenizer_that_puts_no_bos_gets_none(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    row = encode_usable(tokenizer, Preference("Hello", " world", " a"))
    assert tokenizer.bos_token_id not in row.prompt + row.chosen + row.rejected


@pytest.mark.parametrize("name", ["adds_bos", "adds_both", "byte_level_adds_both"])
def test_bos_is_kept_where_the_prompts_start_is_cut(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    row = encode_usable(tokenizer, Preference("abcdefghij" * 3, "k", "l"), max_length=12)
    assert row.prompt[0] == tokenizer.bos_token_id
    assert b"abcdefghij".endswith(spell(tokenizer, row.prompt[1:])) and len(row.prompt) > 2


def test_bos_that_a_template_wrote_is_kept_where_the_start_is_cut() -> None:
    """Also where the tokenizer itself puts none."""
    tokenizer = byte_level(bos=BOS)
    preference = Preference(f"{BOS}{'abcdefghij' * 3}", "k", "l", templated=True)
    [row] = PairTokenizer(tokenizer, 12)([preference])
    assert isinstance(row, Encoded) and row.prompt[0] == tokenizer.bos_token_id
    assert b"abcdefghij".endswith(spell(tokenizer, row.prompt[1:])) and len(row.prompt) > 2


@pytest.mark.parametrize("name", BUILDS)
def test_an_empty_prompt_is_bos_or_nothing(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    row = encode_usable(tokenizer, Preference("", "Hello", "world"))
    puts_bos = name in ("adds_bos", "adds_both", "byte_level_adds_both")
    assert row.prompt == ([tokenizer.bos_token_id] if puts_bos else [])
    assert texts_of(tokenizer, row) == ("", "Hello", "world")


# Cuts


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start", "drop"])
@pytest.mark.parametrize("name", ["byte_level", "byte_level_adds_both", "sentencepiece", "adds_both"])
@few
@given(prompt=texts, chosen=answers, rejected=answers, max_length=st.integers(12, 40))
def test_a_pair_that_is_too_long_is_cut_as_its_option_says(
    name: str, truncation: Truncation, prompt: str, chosen: str, rejected: str, max_length: int
) -> None:
    assume(chosen != rejected)
    tokenizer, preference = TOKENIZERS[name], Preference(prompt, chosen, rejected)
    whole = encode_usable(tokenizer, preference)
    longest = len(whole.prompt) + max(len(whole.chosen), len(whole.rejected))
    row = encode(tokenizer, preference, max_length, truncation)
    if longest <= max_length:
        assert row == whole and whole.cut == ""
    elif truncation == "drop":
        assert isinstance(row, TooLong)
        assert str(longest) in str(row) and str(max_length) in str(row)
    elif isinstance(row, RowFault):
        assert "identical after truncation" in str(row)
        assert chosen.encode()[0] == rejected.encode()[0]  # else no cut could make them so
    else:
        assert row.whole == tuple(map(len, (whole.prompt, whole.chosen, whole.rejected)))
        assert row.cut
        assert_cut(tokenizer, row, whole, max_length, truncation)


def assert_cut(
    tokenizer: PreTrainedTokenizerFast, row: Encoded, whole: Encoded, max_length: int, truncation: Truncation
) -> None:
    """The laws of a cut, from the uncut pair."""
    assert len(row.prompt) + max(len(row.chosen), len(row.rejected)) <= max_length
    assert len(row.prompt) > min(len(whole.prompt), max_length // 2) - CHARACTER
    bos = PairTokenizer(tokenizer, LONG).prefix
    assert row.prompt[: len(bos)] == bos
    rest, uncut = row.prompt[len(bos) :], whole.prompt[len(bos) :]
    assert rest == (uncut[len(uncut) - len(rest) :] if truncation == "keep_end" else uncut[: len(rest)])
    for ids, all_ids in ((row.chosen, whole.chosen), (row.rejected, whole.rejected)):
        assert len(ids) >= 1
        assert ids == all_ids[: len(ids)]
        if len(ids) < len(all_ids):
            assert len(row.prompt) + len(ids) > max_length - CHARACTER  # no more than needed
            assert len(row.prompt) <= max(max_length // 2, len(bos) + 1) or len(row.prompt) == len(whole.prompt)


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
@pytest.mark.parametrize("name", ["byte_level", "adds_both"])
@few
@given(prompt=pieced, chosen=pieced.filter(bool), rejected=pieced.filter(bool), max_length=st.integers(12, 30))
def test_remarks_say_what_was_cut_from_how_many_to_how_many_tokens(
    name: str, truncation: Truncation, prompt: str, chosen: str, rejected: str, max_length: int
) -> None:
    assume(chosen != rejected)
    tokenizer, preference = TOKENIZERS[name], Preference(prompt, chosen, rejected)
    whole = encode_usable(tokenizer, preference)
    row = encode(tokenizer, preference, max_length, truncation)
    assume(isinstance(row, Encoded))
    parts = ("prompt", "chosen", "rejected")
    lengths = [(part, len(getattr(whole, part)), len(getattr(row, part))) for part in parts]
    said = [(part, int(a), int(b)) for part, a, b in re.findall(r"(\w+) cut from (\d+) to (\d+) tokens", row.cut)]
    assert said == [(part, before, after) for part, before, after in lengths if before != after]


@pytest.mark.parametrize("name", ["byte_level", "joined", "sentencepiece", "adds_both"])
@pytest.mark.parametrize("text", ["é漢😀", "漢", "😀"])
def test_a_cut_answer_ends_with_a_whole_character_and_loses_no_more_for_it(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    for max_length in range(12, 40):
        row = encode_usable(tokenizer, Preference("a", text * 50, "b"), max_length)
        assert (text * 50).startswith(spell(tokenizer, row.chosen).decode())
        assert len(row.prompt) + len(row.chosen) > max_length - CHARACTER


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
@pytest.mark.parametrize("name", ["byte_level", "joined", "sentencepiece", "adds_both"])
@pytest.mark.parametrize("text", ["é漢😀", "漢"])
def test_a_cut_prompt_has_whole_characters_only_and_loses_no_more_for_it(
    name: str, truncation: Truncation, text: str
) -> None:
    tokenizer = TOKENIZERS[name]
    bos = PairTokenizer(tokenizer, LONG).prefix
    for max_length in range(12, 24):
        row = encode_usable(tokenizer, Preference(text * 50, "a", "b"), max_length, truncation)
        left = spell(tokenizer, row.prompt[len(bos) :], start=truncation == "keep_start").decode()
        assert left and left in text * 50
        assert len(row.prompt) + len(row.chosen) > max_length - CHARACTER


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_replacement_characters_that_are_in_the_text_are_not_taken_for_cut_ones(name: str) -> None:
    row = encode_usable(TOKENIZERS[name], Preference("a", "\ufffd" * 50, "b"), max_length=30)
    assert len(row.prompt) + len(row.chosen) > 30 - CHARACTER


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
@pytest.mark.parametrize("max_length", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["byte_level", "byte_level_adds_both", "adds_both"])
@few
@given(prompt=st.text("abc", max_size=9), chosen=st.text("abc", min_size=1, max_size=9))
def test_no_length_is_too_short_for_a_token_of_each_answer(
    name: str, truncation: Truncation, max_length: int, prompt: str, chosen: str
) -> None:
    row = encode(TOKENIZERS[name], Preference(prompt, chosen, "d" * 9), max_length, truncation)
    if isinstance(row, RowFault):  # one token each, and both of them the "▁" that starts a text
        assert "identical after truncation" in str(row) and prompt == "" and name == "adds_both"
        return
    assert len(row.chosen) >= 1 and len(row.rejected) >= 1
    assert len(row.prompt) + max(len(row.chosen), len(row.rejected)) <= max_length


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_answers_that_the_cut_makes_identical_are_a_fault(truncation: Truncation) -> None:
    preference = Preference("prompt", "a" * 30 + "b", "a" * 30 + "c")
    fault = encode(byte_level(), preference, 20, truncation)
    assert isinstance(fault, RowFault) and "identical after truncation" in str(fault)
    assert isinstance(encode(byte_level(), preference, 38, truncation), Encoded)


def test_answers_that_differ_inside_the_character_at_the_cut_alone_are_identical_too() -> None:
    """The smileys differ in the last of their four bytes."""
    fault = encode(byte_level(), Preference("ab", "aaaaa😀" + "x" * 9, "aaaaa😁" + "y" * 9), 9)
    assert isinstance(fault, RowFault) and "identical" in str(fault)


# Odd pairs


@pytest.mark.parametrize("name", BUILDS)
def test_an_answer_that_is_the_prefix_of_the_other_stops_where_the_other_goes_on(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    row = encode_usable(tokenizer, Preference("a", " b.", " b. c"))
    assert row.rejected[: len(row.chosen) - 1] == row.chosen[:-1]
    assert row.chosen[-1] == tokenizer.eos_token_id != row.rejected[len(row.chosen) - 1]


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_one_token_answers_are_that_token_and_eos(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    row = encode_usable(tokenizer, Preference("Hello", " world", "a"))
    assert row.chosen == [tokenizer.convert_tokens_to_ids("Ġworld"), tokenizer.eos_token_id]
    assert row.rejected == [tokenizer.convert_tokens_to_ids("a"), tokenizer.eos_token_id]


def test_a_supervised_row_has_no_rejected_ids_and_the_same_others() -> None:
    pair = encode_usable(adds_both(), Preference("Hello ", "world", "a"))
    row = encode_usable(adds_both(), Preference("Hello ", "world", None))
    assert (row.prompt, row.chosen, row.rejected) == (pair.prompt, pair.chosen, [])


@pytest.mark.parametrize("text", ["Hello world. ", "a", "漢字", "\n"])
def test_very_long_rows_are_cut_to_the_length(text: str) -> None:
    long = text * (100_000 // len(text))
    row = encode_usable(byte_level_adds_both(), Preference(long, long + "b", "c" + long), 64)
    assert len(row.prompt) + max(len(row.chosen), len(row.rejected)) in range(65 - CHARACTER, 65)
    assert row.prompt[0] == byte_level_adds_both().bos_token_id
    assert byte_level_adds_both().eos_token_id not in row.chosen + row.rejected
