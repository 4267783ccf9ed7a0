"""Long prompts are tokenized once, answers behind their ends, as if the whole text had been; what gets lost is said.

The oracle of ids is the tokenizer on the whole text, the oracle of what they stand for is `spell`.

Legend: tail, the end of a prompt with which its answers are tokenized
"""

import random
import re
from collections.abc import Callable

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_lightning.data.preference import Preference
from dpo_lightning.data.tails import TAIL
from dpo_lightning.data.tokenization import Encoded, PairTokenizer
from dpo_lightning.data.words import Words
from tests.test_tokenization import BLANKS, LONG, PIECES, encode, encode_usable, pieced, texts_of
from tests.tokenizers_built import BUILDS, BYTE_LEVEL, BYTE_OF, LETTERS, UNK, byte_level, no_eos, spell

few = settings(max_examples=60, deadline=None)


SENTENCEPIECE_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def runs() -> PreTrainedTokenizerFast:
    """Byte-level without words, where runs of blanks and of one letter merge by two, then by four, then one by one.

    So what the last token of a run is depends on where the run began, however far away that is.
    """
    tokens, merges = [], []
    for letter in (LETTERS[ord("a")], LETTERS[ord(" ")], LETTERS[ord("\n")]):
        for left, right in ((1, 1), (2, 2), (4, 1), (2, 1)):
            tokens.append(letter * (left + right))
            merges.append((letter * left, letter * right))
    backend = Tokenizer(BPE({token: number for number, token in enumerate(["<end>", *LETTERS, *tokens])}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def prefixed() -> PreTrainedTokenizerFast:
    """SentencePiece-like, where "▁" takes the first letter of a run, so that a tail's run goes by other twos."""
    merges = [("▁", "a"), ("a", "a"), ("a", "b")]
    known = [UNK, "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", *map("".join, merges)]
    model = BPE({token: number for number, token in enumerate(known)}, merges, unk_token=UNK, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = SENTENCEPIECE_DECODER
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token=UNK)


def unigram() -> PreTrainedTokenizerFast:
    """The likeliest split of a whole text, words not apart; each character of it may move a boundary elsewhere."""
    words = ["▁", "▁world", "▁Hel", "Hello", "lo", "▁▁", "aa", "aaa", "▁a", "a▁", "world", "orl"]
    letters = sorted({c for piece in PIECES for c in piece} - set(" \0"))
    vocabulary = [(UNK, 0.0), ("</s>", 0.0)] + [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    vocabulary += [(word, -3.0 - number / 10) for number, word in enumerate(words)]
    vocabulary += [(letter, -5.0) for letter in letters if letter not in words and letter < "ÿ"]
    backend = Tokenizer(Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = SENTENCEPIECE_DECODER
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token=UNK)


NAMES = ["byte_level", "joined", "sentencepiece", "metaspace", "adds_both"]
TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {name: BUILDS[name]() for name in BUILDS}
TOKENIZERS |= {"runs": runs(), "prefixed": prefixed(), "unigram": unigram(), "slow": ByT5Tokenizer(extra_ids=0)}


@st.composite
def long_texts(draw: st.DrawFn) -> str:
    """Longer than a tail: pieces in any order, or runs of one piece, of any length and with anything around."""
    if draw(st.booleans()):
        count = draw(st.integers(TAIL, 2 * TAIL))
        return "".join(random.Random(draw(st.integers(0, 2**32))).choices(PIECES, k=count))
    before, piece, after = draw(pieced), draw(st.sampled_from([*PIECES, *BLANKS])), draw(pieced)
    return before + piece * draw(st.integers(TAIL, 3 * TAIL)) + draw(st.sampled_from(["", after]))


prompts = long_texts().filter(lambda text: not text.startswith(" "))  # which a SentencePiece-like one may swallow
answers = pieced.filter(bool)


def behind(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> list[int] | None:
    """What an answer's ids are by the tokens of the whole text; None where these do not begin with the prompt's."""
    head, joint = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, prompt + answer))
    return joint[len(head) :] if joint[: len(head)] == head and len(joint) > len(head) else None


# Ids


@pytest.mark.parametrize("name", NAMES)
@few
@given(prompt=prompts, chosen=answers, rejected=answers)
@example(prompt="a" + " " * 3 * TAIL, chosen="world", rejected=" world")
@example(prompt="Hello" * TAIL + "Hel", chosen="lo", rejected="l")
@example(prompt="😀" * TAIL, chosen="😀", rejected="漢")
def test_behind_a_long_prompt_ids_spell_prompt_and_answers_each_apart(
    name: str, prompt: str, chosen: str, rejected: str
) -> None:
    assume(chosen != rejected)
    row = encode_usable(TOKENIZERS[name], Preference(prompt, chosen, rejected))
    assert texts_of(TOKENIZERS[name], row) == (prompt, chosen, rejected)


@pytest.mark.parametrize("name", [*NAMES, "runs", "prefixed", "unigram", "slow"])
@few
@given(prompt=st.one_of(prompts, pieced.filter(bool)), chosen=answers, rejected=answers)
@example(prompt="b" + "a" * 3 * TAIL, chosen="a", rejected="aa")
@example(prompt="a" * 2 * TAIL, chosen="b", rejected="ab")
@example(prompt="b" + "a" * (3 * TAIL + 1), chosen="b", rejected="aab")
@example(prompt="\n" * 3 * TAIL + "a", chosen=" ", rejected="\n")
def test_answers_have_the_ids_that_the_whole_text_gives_them_or_a_remark(
    name: str, prompt: str, chosen: str, rejected: str
) -> None:
    assume(chosen != rejected)
    tokenizer = TOKENIZERS[name]
    row = encode_usable(tokenizer, Preference(prompt, chosen, rejected))
    expected = [behind(tokenizer, prompt, answer) for answer in (chosen, rejected)]
    prefix = PairTokenizer(tokenizer, LONG).prefix
    assert row.prompt == prefix + tokenizer(prompt, add_special_tokens=False).input_ids
    for found, whole in zip((row.chosen, row.rejected), expected, strict=True):
        assert found[-1] == tokenizer.eos_token_id
        assert whole is None or found[:-1] == whole
    assert (row.boundary == "") == (None not in expected)


@pytest.mark.parametrize("name", ["unigram", "slow"])
@few
@given(prompt=prompts, chosen=answers, rejected=answers)
def test_tokenizers_of_other_kinds_give_the_text_back_too(name: str, prompt: str, chosen: str, rejected: str) -> None:
    """One that splits a text as is likeliest as a whole, and one that is no fast tokenizer and knows no offsets."""
    assume(chosen != rejected)
    tokenizer = TOKENIZERS[name]
    row = encode_usable(tokenizer, Preference(prompt, chosen, rejected))
    for answer, ids in ((chosen, row.chosen[:-1]), (rejected, row.rejected[:-1])):
        assert tokenizer.decode(row.prompt + ids, clean_up_tokenization_spaces=False) == prompt + answer


# The work


@pytest.fixture
def given_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that tokenizers are given from now on."""
    texts: list[str] = []
    tokenize = PreTrainedTokenizerFast.__call__

    def recording(self: PreTrainedTokenizerFast, text: str | list[str], *args: object, **options: object) -> object:
        texts.extend([text] if isinstance(text, str) else text)
        return tokenize(self, text, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", recording)
    return texts


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_many_rows_share_is_tokenized_once(name: str, given_texts: list[str]) -> None:
    prompt = "Human: Hello world. a" * 500
    preferences = [Preference(prompt, f" yes {i}", f" no {i}") for i in range(40)]
    encoder = PairTokenizer(TOKENIZERS[name], 100_000)
    given_texts.clear()
    rows = encoder(preferences)
    assert all(isinstance(row, Encoded) and row.boundary == "" for row in rows)
    assert sum(prompt in text for text in given_texts) == (not isinstance(encoder.joints, Words))
    assert sum(map(len, given_texts)) <= len(prompt) + 80 * (TAIL + len("Hello") + len(" yes 10"))


def test_each_of_many_long_prompts_is_tokenized_once(given_texts: list[str]) -> None:
    prompts = [f"Human: {i} " * 100 + "Hello" for i in range(30)]
    encoder = PairTokenizer(BUILDS["joined"](), 100_000)
    given_texts.clear()
    encoder([Preference(prompt, " world", " a") for prompt in prompts])
    assert [sum(prompt in text for text in given_texts) for prompt in prompts] == [1] * 30


# What gets lost


def lowercasing() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def without_fallback() -> PreTrainedTokenizerFast:
    """Letters and blanks; all else is `<unk>`."""
    known = ["<end>", UNK, *"abcdefghijklmnopqrstuvwxyz", "▁", "."]
    backend = Tokenizer(BPE({token: number for number, token in enumerate(known)}, [], unk_token=UNK))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token=UNK)


#: Tokenizers that lose something: which characters.
LOSSY: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "lowercasing": (lowercasing, "ABÉ"),
    "without_fallback": (without_fallback, "A漢é😀"),
}
BUILT = {name: build() for name, (build, _) in LOSSY.items()}


def remarks(row: Encoded) -> list[tuple[str, int]]:
    """`(part, character)` of each remark on a row's text."""
    return [(part, int(n)) for part, n in re.findall(r"the ids of (\w+) spell .*? at character (\d+)", row.text)]


@pytest.mark.parametrize("name", LOSSY)
@few
@given(st.data())
def test_what_ids_do_not_spell_is_said_with_its_part_and_the_first_character(name: str, data: st.DataObject) -> None:
    lost = LOSSY[name][1]
    words = st.text(f"ab. {lost}", min_size=1, max_size=8)
    prompt = data.draw(st.sampled_from(["", "ab. " * TAIL])) + data.draw(words)
    chosen, rejected = data.draw(words), data.draw(words)
    row = encode(BUILT[name], Preference(prompt, chosen, rejected))
    assume(isinstance(row, Encoded))  # what is lost may be all that they differ in
    parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    places = {part: min((n for n, c in enumerate(text) if c in lost), default=None) for part, text in parts.items()}
    assert remarks(row) == [(part, place) for part, place in places.items() if place is not None]


def test_a_remark_shows_what_stands_there_instead() -> None:
    row = encode_usable(lowercasing(), Preference("hello", " World", " a"))
    assert row.text == "the ids of chosen spell 'world' for 'World' at character 1"
    row = encode_usable(without_fallback(), Preference("a漢b", "c", "d"))
    assert row.text == "the ids of prompt spell '<unk>b' for '漢b' at character 1"


@pytest.mark.parametrize("name", [*BUILDS, "runs", "prefixed", "unigram", "slow"])
@few
@given(prompt=st.one_of(prompts, pieced.filter(lambda text: text[:1] != " ")), chosen=answers, rejected=answers)
@example(prompt="a漢" + "😀" * 3, chosen="漢", rejected="😀")
@example(prompt="漢字😀" * TAIL, chosen="漢字", rejected="😀")
@example(prompt="\ufffd" * TAIL, chosen="漢字", rejected="😀")  # as half a character is decoded
def test_a_tokenizer_that_loses_nothing_is_never_said_to(name: str, prompt: str, chosen: str, rejected: str) -> None:
    assume(chosen != rejected)
    assume(prompt or not (chosen.startswith(" ") or rejected.startswith(" ")))
    assert encode_usable(TOKENIZERS[name], Preference(prompt, chosen, rejected)).text == ""


def test_a_sign_that_stands_for_a_space_is_lost_and_said() -> None:
    row = encode_usable(TOKENIZERS["sentencepiece"], Preference("a▁b", " c▁", " d"))
    assert remarks(row) == [("prompt", 1), ("chosen", 2)]


# Without special tokens


@few
@given(prompt=st.one_of(prompts, pieced), chosen=answers, rejected=answers)
def test_without_special_tokens_ids_are_the_text_and_nothing_else(prompt: str, chosen: str, rejected: str) -> None:
    assume(chosen != rejected)
    tokenizer = no_eos()
    row = encode_usable(tokenizer, Preference(prompt, chosen, rejected))
    assert [spell(tokenizer, ids).decode() for ids in (row.prompt, row.chosen, row.rejected)] == [
        prompt,
        chosen,
        rejected,
    ]
    assert {tokenizer.convert_ids_to_tokens(i)[0] in BYTE_OF for i in row.prompt + row.chosen} == {True}
    assert row.text == "" and row.whole == (len(row.prompt), len(row.chosen), len(row.rejected))


def test_without_special_tokens_cuts_leave_a_token_of_each_answer() -> None:
    for max_length in range(2, 12):
        row = encode_usable(no_eos(), Preference("abc" * 9, "d" * 30, "e" * 30), max_length)
        assert 1 <= len(row.chosen) == max_length - len(row.prompt)


def test_every_build_is_asked() -> None:
    assert set(NAMES) <= set(BUILDS) and set(BYTE_LEVEL) <= set(BUILDS)
