"""The same ids as in `tails`, each different word tokenized once, for tokenizers that split a text at words themselves.

A byte-level tokenizer splits a text by a pattern before it looks anything up, and what one part becomes does not depend
on the others. The patterns known here all split behind an ASCII letter or digit that anything else of ASCII follows:
none of their alternatives goes on there, and none looks back. So a text may be cut at these places, and the ids of
its words put together. 5,000 rows of HH are a million words, and 50 thousand different ones.

The ids spell the text where those of each word do: bytes are put together just so. That is proven once a word, too.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_lightning.data.tails import Behind, Head, without

#: Up to an ASCII letter or digit that anything else of ASCII follows; so `é` in "café" does not end a word.
WORD = re.compile(r"[^A-Za-z0-9]*[A-Za-z0-9]+(?:[^\x00-\x7f][^A-Za-z0-9]*[A-Za-z0-9]*)*|[^A-Za-z0-9]+")

#: Words that are tokenized as one text, with an added token between any two.
LINE = 200

#: What half a character decodes to.
LOST = "\ufffd"

#: Tokens of known words that are kept from one batch to the next: some 20 MB.
KEPT = 300_000

#: Patterns that split as said above: of Llama 3, and of Qwen 2 and 3. GPT-2's is built into `ByteLevel`. That of GPT-4o
#: is none of them: it keeps "don't" together.
PATTERNS = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)


class Numbers(dict[str, int]):
    """The number of each word that was asked for, in the order of first asking."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


class Words:
    """Ids of prompts and answers, of a tokenizer for which `splits_at_words` holds.

    Legend: W words of all texts  K different words that are known  L their tokens
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        tokens = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        added = sorted((t.content for t in tokens if not (t.special and tokenizer.split_special_tokens)), key=len)
        # The longest first: where several begin at a place, that one is found.
        self.added = re.compile(f"({'|'.join(map(re.escape, reversed(added)))})") if added else None
        self.reach = max(map(len, added), default=1)
        self.separator = next((token for token in added if stands_apart(token, added)), None)
        self.forget()

    def forget(self) -> None:
        """Know no word but the separator, which is the first."""
        self.numbers = Numbers()
        self.ids = np.empty(0, np.int32)  # [L] of the words in the order of their numbers
        self.ends = np.zeros(1, np.int64)  # [K + 1] where each word's end among them, 0 first
        self.proven = np.empty(0, bool)  # [K] whether a word's ids are known to spell it
        if self.separator is not None:
            self.encode([[self.separator]])

    def heads(self, texts: Iterable[str]) -> dict[str, Head]:
        """Each prompt, tokenized once."""
        if len(self.ids) > KEPT:
            self.forget()
        split = {text: self.split(text) for text in texts}
        found = self.encode(list(split.values()))
        return {
            text: Head(text, ids, self.tail(words), spelled)
            for (text, words), (ids, spelled) in zip(split.items(), found, strict=True)
        }

    def behind(self, answers: Sequence[tuple[Head, str]]) -> list[Behind | None]:
        """What follows the prompt's ids in the joint text's; None where these do not begin with the prompt's."""
        tails = list(dict.fromkeys(head.tail for head, _ in answers))
        joints = [self.split(head.tail + answer) for head, answer in answers]
        found = self.encode([*map(self.split, tails), *joints])
        before = {tail: ids for tail, (ids, _) in zip(tails, found, strict=False)}
        result: list[Behind | None] = []
        for (head, _), (joint, spelled) in zip(answers, found[len(tails) :], strict=True):
            ids = without(before[head.tail], joint)
            result.append(None if ids is None else Behind(ids, head.spelled and spelled))
        return result

    def split(self, text: str) -> list[str]:
        """A text's words; an added token is one of its own."""
        parts = [text] if self.added is None else self.added.split(text)
        if len(parts) == 1:
            return WORD.findall(text)
        return [word for n, part in enumerate(parts) for word in ([part] if n % 2 else WORD.findall(part))]

    def tail(self, words: Sequence[str]) -> str:
        """The last words of a prompt, as many as an added token may reach back from behind it."""
        length, count = 0, 0
        while length < self.reach and count < len(words):
            count += 1
            length += len(words[-count])
        return "".join(words[len(words) - count :])

    def encode(self, texts: Sequence[Sequence[str]]) -> list[tuple[list[int], bool]]:
        """The ids of each text, given as its words, and whether they are known to spell it."""
        ends = np.cumsum([0, *map(len, texts)])  # of the texts among all words
        places = map(self.numbers.__getitem__, chain.from_iterable(texts))
        numbers = np.fromiter(places, np.int64, ends[-1])  # [W]
        self.learn(list(islice(self.numbers, len(self.proven), None)))
        starts, counts = self.ends[numbers], np.diff(self.ends)[numbers]
        after = np.concatenate([[0], np.cumsum(counts)])  # [W + 1] where each word's ids end among all texts'
        ids = self.ids[np.repeat(starts - after[:-1], counts) + np.arange(after[-1])].tolist()
        unproven = np.concatenate([[0], np.cumsum(~self.proven[numbers])])[ends]
        return [
            (ids[start:end], not some)
            for (start, end), some in zip(pairwise(after[ends].tolist()), np.diff(unproven).tolist(), strict=True)
        ]

    def learn(self, new: list[str]) -> None:
        """Tokenize words that are not known yet, in the order of their numbers."""
        if not new:
            return
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # which an earlier call may have left there
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        # The separator itself is learned alone, and before all others.
        joined = self.separator is not None and self.separator not in new
        lines = [self.separator.join(new[n : n + LINE]) for n in range(0, len(new), LINE)] if joined else new
        found = [encoding.ids for encoding in backend.encode_batch_fast(lines, add_special_tokens=False)]
        if joined:
            found = apart(found, self.ids[0])
        if len(found) != len(new):  # the separator shares its id with an ordinary token
            self.separator = None
            self.learn(new)
            return
        backs = backend.decode_batch(found, skip_special_tokens=False)
        proven = [word == back and LOST not in word for word, back in zip(new, backs, strict=True)]
        self.proven = np.append(self.proven, proven)
        self.ends = np.append(self.ends, self.ends[-1] + np.cumsum([*map(len, found)]))
        self.ids = np.append(self.ids, np.fromiter(chain.from_iterable(found), np.int32))


def apart(lists: Iterable[Sequence[int]], separator: int) -> list[list[int]]:
    """The ids of each word, out of those of lines.

    >>> apart([[1, 2, 0, 3], [4]], separator=0)
    [[1, 2], [3], [4]]
    """
    ids = [*chain.from_iterable([*line, separator] for line in lists)]
    ends = np.flatnonzero(np.array(ids) == separator).tolist()
    return [ids[start + 1 : end] for start, end in pairwise([-1, *ends])]


def stands_apart(token: str, added: Sequence[str]) -> bool:
    """Whether an added token between any two words is found there: none reaches into it, or goes on from it."""
    return all(token[0] not in other[1:] and (other == token or not other.startswith(token)) for other in added)


def splits_at_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is byte-level, splits as said at the top, and nothing before that reaches over the places."""
    if not tokenizer.is_fast:
        return False
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder().values()
    plain = not any(t.lstrip or t.rstrip or t.single_word or (t.normalized and backend.normalizer) for t in added)
    # Of two kinds the tokenizer looks for one first, wherever it is.
    one_kind = len({t.normalized for t in added}) <= 1
    # Special ones that are left as text are found all the same, and hide others that they begin with.
    one_kind &= not tokenizer.split_special_tokens or len({t.special for t in added}) <= 1
    exact = plain and one_kind and not getattr(backend.model, "dropout", None)
    return (
        exact and kind(backend.normalizer) in ("", "NFC") and kind(backend.decoder) == "ByteLevel" and splits(backend)
    )


def splits(backend: Any) -> bool:
    """Whether all steps of splitting respect the places, and one splits there."""
    state = parsed(backend.pre_tokenizer)
    found = False
    for step in state.get("pretokenizers", [state]):
        match step:
            case {"type": "Digits"}:
                pass
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(by_pattern)}:
                found = found or by_pattern
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                found = True
                if pattern not in PATTERNS:
                    return False
            case _:
                return False
    return found


def kind(part: Any) -> str:
    """The type of a part of a tokenizer; empty where it has none."""
    return parsed(part).get("type", "")


def parsed(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as it stands in its file."""
    return json.loads(part.__getstate__()) if part is not None else {}
