"""Words put together have the ids of the whole text, whatever text it is; tokenizers for which that fails are known.

The oracle is the tokenizer on the whole text.
"""

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dpo_lightning.data.words import PATTERNS, Words, splits_at_words, stands_apart
from tests.test_tokenization import PIECES
from tests.tokenizers_built import BUILDS, LETTERS, as_bytes, chains

few = settings(max_examples=150, deadline=None)

#: Merges that show where a pattern splits: between any two of these characters there is one.
MERGING = "ab1' .,\n\t<|>_é-"
ADDED = ("<|im_start|>", "<|im", "ab ba", "__")

GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def built(splitter: PreTokenizer | None, added: tuple[str, ...] = (), **flags: bool) -> PreTrainedTokenizerFast:
    """Byte-level, with a token for each two and for many three of `MERGING`."""
    pairs = [a + b for a in MERGING for b in MERGING]
    tokens, merges = chains([*map(as_bytes, pairs), *(as_bytes(f"{pair}{pair[0]}") for pair in pairs)])
    vocabulary = {token: number for number, token in enumerate([*LETTERS, *tokens])}
    backend = Tokenizer(BPE(vocabulary, merges))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, **({"normalized": False} | flags)) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def by_pattern(pattern: str) -> PreTokenizer:
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def composing() -> PreTrainedTokenizerFast:
    tokenizer = built(by_pattern(PATTERNS[1]), ADDED)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def special() -> PreTrainedTokenizerFast:
    """Where a text that spells a special token is ordinary text."""
    tokenizer = built(ByteLevel(add_prefix_space=False), ADDED[1:], special=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, split_special_tokens=True)


#: Those that split at words.
KINDS: dict[str, PreTrainedTokenizerFast] = {
    "GPT-2": built(ByteLevel(add_prefix_space=False)),
    "GPT-2, added": built(ByteLevel(add_prefix_space=False), ADDED),
    "GPT-2, added and normalized": built(ByteLevel(add_prefix_space=False), ADDED, normalized=True),
    "digits apart": built(Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]), ADDED),
    "Llama 3": built(by_pattern(PATTERNS[0]), ADDED),
    "Qwen 2": built(by_pattern(PATTERNS[1]), ADDED),
    "composing": composing(),
    "special": special(),
}

texts = st.one_of(
    st.text(MERGING, max_size=30),
    st.lists(
        st.sampled_from([*PIECES, *ADDED, "don't", "I'LL", "12345", "x2", "e\u0301", "\x1c", "\x85"]), max_size=12
    ).map("".join),
    st.text(max_size=20),
)


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def by_words(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    words = Words(tokenizer)
    split = words.split(text)
    assert "".join(split) == text
    [(ids, _)] = words.encode([split])
    return ids


@pytest.mark.parametrize("name", KINDS)
@few
@given(texts)
@example("a  b   c\n\n d \t e.\r\n  f")
@example("don't I'll 'tis 1's _'s café's e\u0301'd")
@example("<|im<|im_start|>ab ba__a_b <|im_start")
def test_the_words_ids_are_those_of_the_whole_text(name: str, text: str) -> None:
    assert splits_at_words(KINDS[name])
    assert by_words(KINDS[name], text) == whole(KINDS[name], text)


@pytest.mark.parametrize("name", KINDS)
@few
@given(prompt=texts, answer=texts.filter(bool))
@example("a <|im_sta", "rt|>b")
@example("a b__ab b", "a ba")
@example("__ <|im", "_start|>")
def test_an_answer_has_the_ids_behind_its_prompts_in_the_whole_text(name: str, prompt: str, answer: str) -> None:
    tokenizer = KINDS[name]
    words = Words(tokenizer)
    [head] = words.heads([prompt]).values()
    assert head.ids == whole(tokenizer, prompt) and prompt.endswith(head.tail)
    joint = whole(tokenizer, prompt + answer)
    begins = joint[: len(head.ids)] == head.ids and len(joint) > len(head.ids)
    [behind] = words.behind([(head, answer)])
    assert (behind and behind.ids) == (joint[len(head.ids) :] if begins else None)


@pytest.mark.parametrize("name", KINDS)
@few
@given(prompt=texts, answer=texts.filter(bool))
@example("e\u0301", " e\u0301")
@example("\ufffd", " \ufffd")
def test_what_is_said_to_be_spelled_decodes_to_its_text(name: str, prompt: str, answer: str) -> None:
    words, decode = Words(KINDS[name]), KINDS[name].backend_tokenizer.decode
    [head] = words.heads([prompt]).values()
    [behind] = words.behind([(head, answer)])
    assert not head.spelled or decode(head.ids, skip_special_tokens=False) == prompt
    if behind is not None and behind.spelled:
        assert decode(head.ids + behind.ids, skip_special_tokens=False) == prompt + answer


def test_ordinary_texts_are_known_to_be_spelled() -> None:
    words = Words(KINDS["Llama 3"])
    [head] = words.heads(["Hello wörld, 漢字.\n\nIt's 5 o'clock"]).values()
    [behind] = words.behind([(head, " is it? <|im_start|>")])
    assert head.spelled and behind is not None and behind.spelled


class Watched:
    """A backend, whose methods cannot be replaced, that keeps the texts it is given."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.given: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts: list[str], **options: bool) -> object:
        self.given.extend(texts)
        return self.backend.encode_batch_fast(texts, **options)


def test_each_different_word_is_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words(KINDS["GPT-2"])
    backend = Watched(words.tokenizer.backend_tokenizer)
    monkeypatch.setattr(words.tokenizer, "_tokenizer", backend)
    heads = words.heads(["a b a b a.", "b a b. c"])
    assert sorted(backend.given) == sorted(["a", " b", " a", ".", "b", ". c"])
    backend.given.clear()
    words.behind([(head, " a c") for head in heads.values()])
    assert sorted(backend.given) == sorted([". a", " c"])


def test_few_words_are_kept_from_one_batch_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_lightning.data.words.KEPT", 100)
    words = Words(KINDS["GPT-2"])
    for batch in range(20):
        text = f"{batch} and more of it{'!' * batch}" * 3
        [head] = words.heads([text]).values()
        assert head.ids == whole(KINDS["GPT-2"], text)
        assert len(words.ids) == words.ends[-1] < 300 and len(words.numbers) == len(words.proven)


@pytest.mark.parametrize(
    ("token", "others", "apart"),
    [
        ("<|end|>", [], True),
        ("<|end|>", ["<|im|>", "<|im", "|>"], True),
        ("<|im", ["<|im|>"], False),  # goes on from it
        ("<|im|>", ["a<b"], False),  # reaches into it
        ("__", [], False),  # behind an underscore it would be found one place too early
    ],
)
def test_a_separator_is_found_where_it_was_put(token: str, others: list[str], apart: bool) -> None:
    assert stands_apart(token, [token, *others]) == apart


@pytest.mark.parametrize("name", KINDS)
def test_most_tokenizers_have_a_separator_and_the_others_do_without(name: str) -> None:
    assert (Words(KINDS[name]).separator is None) == (name in ("GPT-2", "special"))


def test_many_words_are_tokenized_as_few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words(KINDS["GPT-2, added"])
    text = "a b. a<|im_start|> c d <|im_start|>"
    wanted = whole(KINDS["GPT-2, added"], text)
    backend = Watched(words.tokenizer.backend_tokenizer)
    monkeypatch.setattr(words.tokenizer, "_tokenizer", backend)
    monkeypatch.setattr("dpo_lightning.data.words.LINE", 3)
    assert words.encode([words.split(text)]) == [(wanted, True)]
    assert backend.given == [words.separator.join(line) for line in (["a", " b", ". a"], [" c", " d", " "])]


@pytest.mark.parametrize("text", ["b a", "a b", "a b a b"])
def test_an_added_token_that_shares_its_id_with_an_ordinary_one_separates_nothing(text: str) -> None:
    """`Ġa` is how the vocabulary writes " a"."""
    tokenizer = built(ByteLevel(add_prefix_space=False), ("\u0120a",))
    words = Words(tokenizer)
    assert words.separator == "\u0120a"
    assert by_words(tokenizer, text) == whole(tokenizer, text)
    assert words.encode([words.split(text)])[0][0] == whole(tokenizer, text)


def test_special_tokens_that_are_left_as_text_hide_others_so_that_it_is_not_known() -> None:
    backend = built(ByteLevel(add_prefix_space=False), ("<|im",)).backend_tokenizer
    backend.add_special_tokens(["<|im_start|>"])
    known, hiding = (
        PreTrainedTokenizerFast(tokenizer_object=backend, split_special_tokens=split) for split in (False, True)
    )
    assert splits_at_words(known) and not splits_at_words(hiding)
    assert by_words(hiding, "<|im_start|> a") != whole(hiding, "<|im_start|> a")  # it would be wrong


def test_many_texts_at_once_are_each_what_they_are_alone() -> None:
    tokenizer = KINDS["Llama 3"]
    given = ["", "a b a", "", "b\ufffd a", "<|im_start|>b", "a b a"]
    words = Words(tokenizer)
    found = words.encode([words.split(text) for text in given])
    assert [ids for ids, _ in found] == [whole(tokenizer, text) for text in given]
    assert [spelled for _, spelled in found] == [True, True, True, False, True, True]
    assert words.encode([]) == []


#: Those of which it is not known, and a text in which the words would get other ids, or None.
OTHERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "GPT-4o": lambda: built(by_pattern(GPT_4O)),
    "no words": lambda: built(ByteLevel(add_prefix_space=False, use_regex=False)),
    "a space put first": lambda: built(ByteLevel(add_prefix_space=True)),
    "merged": lambda: built(
        Sequence([Split(Regex(PATTERNS[0]), "merged_with_next"), ByteLevel(add_prefix_space=False, use_regex=False)])
    ),
    "takes blanks behind": lambda: built(ByteLevel(add_prefix_space=False), ("b",), rstrip=True),
    "takes blanks before": lambda: built(ByteLevel(add_prefix_space=False), ("b",), lstrip=True),
    "only a whole word": lambda: built(ByteLevel(add_prefix_space=False), ("b",), single_word=True),
    "white space": lambda: built(pre_tokenizers.WhitespaceSplit()),
    "nothing": lambda: built(None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_are_known(name: str) -> None:
    assert not splits_at_words(OTHERS[name]())


@pytest.mark.parametrize("name", [name for name in BUILDS if name not in ("sentencepiece", "metaspace")])
def test_of_the_small_tokenizers_those_that_are_byte_level_and_split_do(name: str) -> None:
    assert splits_at_words(BUILDS[name]()) == (
        name in ("byte_level", "pad_is_eos", "plain_text", "byte_level_adds_both")
    )


def test_a_slow_tokenizer_does_not_split_at_words() -> None:
    assert not splits_at_words(ByT5Tokenizer(extra_ids=0))


@pytest.mark.parametrize(
    ("name", "text"),
    [("GPT-4o", "b's"), ("no words", "b.b"), ("a space put first", "a.b"), ("takes blanks behind", "a b c")],
)
def test_where_it_is_not_known_words_may_have_other_ids(name: str, text: str) -> None:
    """That is, the tests above can fail."""
    assert by_words(OTHERS[name](), text) != whole(OTHERS[name](), text)


def test_added_tokens_of_two_kinds_are_not_known() -> None:
    """Those that a normalizer does not touch are looked for first, wherever others begin."""
    tokenizer = built(pre_tokenizers.ByteLevel(add_prefix_space=False), ("<|a|>",))
    assert splits_at_words(tokenizer)
    tokenizer.backend_tokenizer.add_tokens([AddedToken("x<|a", normalized=True)])
    assert not splits_at_words(tokenizer)
