"""Whether BOS, EOS, special tokens, the boundary and the chat template are as they should be, counted by the ids.

Legend: P pairs
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from dpo_lightning.data.compiler import arrow, column, remarked
from dpo_lightning.data.tokenization import PairTokenizer


@dataclass(frozen=True)
class Check:
    """Something about tokens or templates that is as it should be, or is not."""

    sound: bool
    text: str


def token_checks(tables: list[Dataset], encoder: PairTokenizer, spelled: int, looked_at: int) -> Iterator[Check]:
    """All checks.

    Args:
        tables: of the pairs that train and validate.
        encoder: that made their ids.
        spelled: pairs in whose texts a special token is written.
        looked_at: pairs whose texts were looked at for it.
    """
    yield from eos_checks(tables, encoder)
    yield from bos_checks(tables, encoder)
    yield template_check(tables, encoder)
    if spelled:
        yield Check(False, f"{spelled:,} of {looked_at:,} pairs have a special token written in their text")
    else:
        yield Check(True, f"No text holds a special token ({looked_at:,} pairs looked at)")
    used = sum(map(len, tables))
    if merged := sum(len(remarked(table, "boundary")) for table in tables):
        said = f"In {merged:,} of {used:,} pairs a token would merge prompt and answer; it was split there"
        yield Check(merged < 0.01 * used, said)
    else:
        yield Check(True, "No token merges prompt and answer")
    if unfaithful := sum(len(remarked(table, "text")) for table in tables):
        yield Check(False, f"The ids of {unfaithful:,} of {used:,} pairs do not spell their text")
    else:
        yield Check(True, "The ids of every pair, decoded, are its text")


def eos_checks(tables: list[Dataset], encoder: PairTokenizer) -> Iterator[Check]:
    """EOS ends every answer, and stands nowhere else in it."""
    if encoder.eos is None:
        yield Check(False, "The tokenizer has no EOS token: answers have no end that could be learned")
        return
    cut = inner = 0
    for table in tables:
        for part in ("chosen", "rejected"):
            present = column(table, f"{part}_tokens") > 0
            ended = present & (edge_ids(table, part, last=True) == encoder.eos)
            cut += int((present & ~ended).sum())
            inner += int((count_ids(table, part, [encoder.eos]) > ended).sum())
    name = encoder.tokenizer.eos_token
    but = f" but the {cut:,} that are cut" if cut else ""
    yield Check(True, f"EOS {name!r} ({encoder.eos}) ends every answer{but}, and is in the loss")
    if inner:
        yield Check(False, f"In {inner:,} answers EOS stands before their end, too")


def bos_checks(tables: list[Dataset], encoder: PairTokenizer) -> Iterator[Check]:
    """BOS begins every prompt, once, where the tokenizer puts one, or a template does."""
    bos = encoder.prefix[0] if encoder.prefix else encoder.tokenizer.bos_token_id
    if bos is None:
        yield Check(True, "The tokenizer has no BOS token")
        return
    begins = np.concatenate([edge_ids(table, "prompt", last=False) == bos for table in tables])
    doubled = sum(doubles(table, "prompt", bos) for table in tables)
    templated = np.concatenate([column(table, "templated") for table in tables])
    name = encoder.tokenizer.decode([bos])
    without = int((templated & ~begins).sum())
    if encoder.prefix and without:
        yield Check(
            False,
            f"The tokenizer puts BOS before a text, but the chat template does not, in {without:,} pairs: the "
            "template is followed",
        )
    elif begins.all():
        yield Check(True, f"BOS {name!r} begins every prompt")
    elif not begins.any():
        yield Check(True, "The tokenizer puts no BOS before a text, so that there is none")
    else:
        yield Check(True, f"BOS {name!r} begins {int(begins.sum()):,} of {len(begins):,} prompts")
    if doubled and bos != encoder.eos:
        yield Check(False, f"In {doubled:,} prompts BOS stands twice in a row")


def template_check(tables: list[Dataset], encoder: PairTokenizer) -> Check:
    """Whether the rows go through a chat template, if there is one."""
    templated = sum(int(column(table, "templated").sum()) for table in tables)
    if templated:
        return Check(True, f"{templated:,} pairs are conversations, written by the tokenizer's chat template")
    if encoder.tokenizer.chat_template is not None:
        said = "The tokenizer has a chat template, but the rows are plain text, which does not go through it"
        return Check(False, said)
    return Check(True, "The rows are plain text, and the tokenizer has no chat template")


def edge_ids(table: Dataset, part: str, last: bool) -> np.ndarray:
    """`[P]` the first or the last id of each; -1 where there is none."""
    cells = arrow(table, part).combine_chunks()
    offsets, ids = cells.offsets.to_numpy(), np.append(cells.values.to_numpy(), -1)
    places = offsets[1:] - 1 if last else offsets[:-1]
    return np.where(offsets[1:] > offsets[:-1], ids[places], -1)


def count_ids(table: Dataset, part: str, ids: list[int]) -> np.ndarray:
    """`[P]` how many of each's ids are among some."""
    cells = arrow(table, part).combine_chunks()
    offsets = cells.offsets.to_numpy()
    count = np.concatenate([[0], np.cumsum(np.isin(cells.values.to_numpy(), ids))])
    return count[offsets[1:]] - count[offsets[:-1]]


def doubles(table: Dataset, part: str, wanted: int) -> int:
    """In how many of a table's lines an id stands twice in a row."""
    cells = arrow(table, part).combine_chunks()
    offsets, hits = cells.offsets.to_numpy(), cells.values.to_numpy() == wanted
    twice = np.append(hits[:-1] & hits[1:], False)
    twice[offsets[1:-1] - 1] = False  # the last of one line and the first of the next
    count = np.concatenate([[0], np.cumsum(twice)])
    return int((count[offsets[1:]] > count[offsets[:-1]]).sum())
