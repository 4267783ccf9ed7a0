"""Small tokenizers of each kind that a pair can meet, built in memory; and `spell`, which reads ids without them.

Two families: byte-level like GPT-2's (its 256 byte letters, its split into words) and like SentencePiece's (a space is
"▁", one is put before the text, what is not in the vocabulary falls back to bytes). Both know few words, so that
ordinary letters are single tokens, and some merge over the boundary: "Hello " + "world" has the one token " world".
"""

from collections.abc import Callable, Iterable, Sequence

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

GPT_EOS = "<|endoftext|>"
BOS, EOS, UNK = "<s>", "</s>", "<unk>"

#: GPT-2's letter of each byte: printable ones are themselves, the others follow from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = [chr(byte) for byte in range(256)]
for _number, _byte in enumerate(sorted(set(range(256)) - set(PRINTABLE))):
    LETTERS[_byte] = chr(256 + _number)
BYTE_OF = {letter: byte for byte, letter in enumerate(LETTERS)}

#: Words with a token of their own. The bytes of "é" merge; of "😀" only the first two, so a token can end inside it.
WORDS = (" world", "Hello", "world", "\n\n", "\r\n", "  ", "é")


def chains(words: Iterable[Sequence[str]]) -> tuple[list[str], list[tuple[str, str]]]:
    """The tokens and merges that build each word from its letters, left to right."""
    tokens, merges = [], []
    for word in words:
        for end in range(1, len(word)):
            left, right = "".join(word[:end]), word[end]
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
    return list(dict.fromkeys(tokens)), merges


def as_bytes(text: str) -> str:
    """A text in byte letters."""
    return "".join(LETTERS[byte] for byte in text.encode())


def byte_level(
    bos: str | None = None, eos: str | None = GPT_EOS, pad: str | None = None, words: bool = True
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; without `words` it does not split at words first, so that any two characters may merge."""
    tokens, merges = chains([*map(as_bytes, WORDS), as_bytes("😀")[:2]])
    special = list(dict.fromkeys(token for token in (GPT_EOS, bos, eos, pad) if token))
    vocabulary = {token: number for number, token in enumerate([*special, *LETTERS, *tokens])}
    backend = Tokenizer(BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)


def joined() -> PreTrainedTokenizerFast:
    """Byte-level without words: "\\n" + "\\n" and "Hel" + "lo" merge over the boundary too."""
    return byte_level(words=False)


def pad_is_eos() -> PreTrainedTokenizerFast:
    """Byte-level with one token for padding and the end, as GPT-2 is used."""
    return byte_level(pad=GPT_EOS)


def no_eos() -> PreTrainedTokenizerFast:
    """Byte-level without an EOS token."""
    return byte_level(eos=None)


def plain_text() -> PreTrainedTokenizerFast:
    """Byte-level where a text that spells a special token is ordinary text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level().backend_tokenizer, eos_token=GPT_EOS, split_special_tokens=True
    )


def template(
    tokenizer: PreTrainedTokenizerFast, before: str | None = None, after: str | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer, which from now on puts special tokens around a text."""
    single = " ".join(part for part in (before, "$A", after) if part)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (before, after) if token]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def sentencepiece(metaspace: bool = False) -> PreTrainedTokenizerFast:
    """Like Llama-2's: "▁" put before the text by a normalizer; or by a pre-tokenizer that also splits, `metaspace`."""
    tokens, merges = chains([word.replace(" ", "▁") for word in (" world", " Hello", "Hello", "world", "  ")])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [chr(code) for code in range(33, 127)]
    known = list(dict.fromkeys([UNK, BOS, EOS, *fallback, "▁", *letters, "é", *tokens]))
    vocabulary = {token: number for number, token in enumerate(known)}
    backend = Tokenizer(BPE(vocabulary, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, unk_token=UNK)


def metaspace() -> PreTrainedTokenizerFast:
    return sentencepiece(metaspace=True)


def adds_bos() -> PreTrainedTokenizerFast:
    return template(sentencepiece(), before=BOS)


def adds_eos() -> PreTrainedTokenizerFast:
    return template(sentencepiece(), after=EOS)


def adds_both() -> PreTrainedTokenizerFast:
    return template(sentencepiece(), before=BOS, after=EOS)


def byte_level_adds_both() -> PreTrainedTokenizerFast:
    return template(byte_level(bos=BOS), before=BOS, after=GPT_EOS)


Build = Callable[[], PreTrainedTokenizerFast]

#: Those that hold any text, and those that hold texts without "▁"; all have an EOS token.
BYTE_LEVEL: dict[str, Build] = {
    build.__name__: build for build in (byte_level, joined, pad_is_eos, plain_text, byte_level_adds_both)
}
SENTENCEPIECE: dict[str, Build] = {
    build.__name__: build for build in (sentencepiece, metaspace, adds_bos, adds_eos, adds_both)
}
BUILDS: dict[str, Build] = BYTE_LEVEL | SENTENCEPIECE


def spell(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], start: bool = False) -> bytes:
    """The bytes that ids stand for, read off the vocabulary alone; special tokens stand for their names.

    Args:
        tokenizer: one of those built here.
        ids: token ids.
        start: whether they are the start of a text, where a "▁" that the tokenizer put there is not part of it.
    """
    pieces = []
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        if token in tokenizer.all_special_tokens:
            pieces.append(token.encode())
        elif not tokenizer.backend_tokenizer.model.byte_fallback:
            pieces.append(bytes(BYTE_OF[letter] for letter in token))
        elif token.startswith("<0x") and len(token) == 6:
            pieces.append(bytes([int(token[3:5], 16)]))
        else:
            pieces.append(token.replace("▁", " ").encode())
    text = b"".join(pieces)
    return text.removeprefix(b" ") if start and tokenizer.backend_tokenizer.model.byte_fallback else text
