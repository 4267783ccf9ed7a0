"""Everything that `inspect` tells of a source, as plain values: what is in it, what will be cut, what looks wrong."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpo_lightning.data.characters import Oddity, languages, oddities
from dpo_lightning.data.compiler import Compiler, arrow, column, remarked, row_name
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.findings import (
    PARTS,
    Cut,
    LengthBias,
    Lengths,
    Repetitions,
    cuts,
    layout_costs,
    length_bias,
    lengths_of,
    repetitions,
)
from dpo_lightning.data.tables import Part

#: Pairs whose characters, and whose language, are looked at; spread evenly over the table.
SAMPLED, CLASSIFIED = 5_000, 250

#: Other limits that the report tells the cuts of.
LIMITS = (256, 512, 1024, 2048, 4096, 8192)

#: Tokens of a sample that are shown: of the prompt's end, and of each answer's start.
SHOWN = 100


@dataclass(frozen=True)
class SourceSummary:
    """One source of one split: how its rows were read, and what became of them."""

    name: str
    split: str
    format: str
    rows: int
    pairs: int
    used: int
    dropped: int
    bad: int
    cut: int


@dataclass(frozen=True)
class Reason:
    """What was done to rows for one reason, with the places of all of them in words."""

    action: str
    reason: str
    count: int
    rows: list[str]


@dataclass(frozen=True)
class Token:
    """One token of a sample: its text, its branch, and whether its log-probability is in the loss."""

    text: str
    branch: str
    in_loss: bool


@dataclass(frozen=True)
class Sample:
    """A pair as the model sees it: of a long prompt the end, of a long answer the start, and how many are hidden."""

    place: str
    tokens: dict[str, list[Token]]
    hidden: dict[str, int]


@dataclass(frozen=True)
class Check:
    """Something about tokens or templates that is as it should be, or is not."""

    sound: bool
    text: str


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    sources: list[SourceSummary]
    bad_rows: float
    reasons: list[Reason]
    train: int
    val: int
    max_length: int
    truncation: str | None
    lengths: Lengths
    cuts: list[Cut]
    layout: str
    batch_size: int
    costs: dict[str, float]
    prompts: int
    repetitions: dict[str, list[list[str]]]
    both_sides: list[str]
    bias: LengthBias | None
    checks: list[Check]
    samples: list[Sample]
    looked_at: int
    classified: int
    languages: dict[str, float]
    oddities: list[tuple[Oddity, list[str]]]


class Inspector:
    """Looks at what a data module has compiled.

    Args:
        data: compiled, with its whole sources as tables.
        tokenizer: that it was compiled with.
    """

    def __init__(self, data: PreferenceDataModule, tokenizer: PreTrainedTokenizerBase) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.max_length = data.encoder.max_length
        self.train, self.val = data.tables["train"], data.tables["val"]
        self.parts = data.parts.get("train", data.parts.get("all", []))  # "all" is what was split into train and val
        self.pairwise = bool(column(self.train, "rejected_tokens").any())

    def __call__(self) -> Inspection:
        """Everything."""
        lengths = lengths_of([self.train, self.val])
        prompt, *answers = (column(self.train, f"{part}_tokens") for part in PARTS)
        texts = self.sampled_texts()
        classified = list(texts)[:: max(1, len(texts) // CLASSIFIED)]
        return Inspection(
            sources=[self.source(part, split) for split, parts in self.data.parts.items() for part in parts],
            bad_rows=self.data.bad_rows,
            reasons=self.reasons(),
            train=len(self.train),
            val=len(self.val),
            max_length=self.max_length,
            truncation=self.data.truncation,
            lengths=lengths,
            cuts=cuts(lengths, self.limits(lengths)),
            layout=self.data.layout,
            batch_size=self.data.batch_size,
            costs=layout_costs(prompt, answers if lengths.pairwise else answers[:1], self.data.batch_size),
            prompts=len(np.unique(column(self.train, "prompt_hash"))),
            repetitions=self.repetitions(),
            both_sides=self.both_sides(),
            bias=length_bias(lengths) if lengths.pairwise else None,
            checks=list(self.checks()),
            samples=self.samples(),
            looked_at=len(texts),
            classified=len(classified),
            languages=languages([texts[number] for number in classified]),
            oddities=[(odd, self.places(self.train, odd.first)) for odd in oddities(texts)],
        )

    def limits(self, lengths: Lengths) -> list[int]:
        """This run's limit, and others up to the first that cuts nothing."""
        longest = int(lengths.longest.max())
        enough = next((limit for limit in LIMITS if limit >= longest), LIMITS[-1])
        return [self.max_length, *(limit for limit in LIMITS if limit <= enough)]

    def source(self, part: Part, split: str) -> SourceSummary:
        """How many rows and pairs, and what became of them."""
        dropped, cut = (len(remarked(part.lines, name)) for name in ("fault", "cut"))
        pairs = len(part.lines)
        bad = int(column(part.lines, "bad").sum())
        name = part.format.__name__
        return SourceSummary(part.name, split, name, len(part.rows), pairs, pairs - dropped, dropped, bad, cut)

    def reasons(self) -> list[Reason]:
        """The ledger, by action and reason, numbers in the reasons aside; the most frequent first."""
        frame = self.data.ledger.to_pandas()
        frame["kind"] = frame["reason"].str.replace(r"\d+", "N", regex=True)
        frame.loc[frame["action"] == "cut", "kind"] = (
            frame["kind"]
            .str.replace(r" from N to N tokens", "", regex=True)
            .str.replace(r"; (\w+) cut", r", \1 cut", regex=True)
        )
        names = list(dict.fromkeys(part.name for parts in self.data.parts.values() for part in parts))
        short = dict(zip(names, short_names(names), strict=True))
        found = []
        for (action, kind), group in frame.groupby(["action", "kind"], sort=False):
            places = [
                (f"{short[source]} " if len(names) > 1 else "") + row_name(row, pair)
                for source, row, pair in zip(group["source"], group["row"], group["pair"], strict=True)
            ]
            found.append(Reason(action, kind, len(group), places))
        return sorted(found, key=lambda reason: -reason.count)

    def places(self, table: Dataset, numbers: list[int]) -> list[str]:
        """Some lines of a table in words."""
        chosen = table.select(numbers)
        rows = zip(chosen["source"][:], chosen["row"][:], chosen["pair"][:], strict=True)
        names = short_names([part.name for part in self.parts])
        return [(f"{names[s]} " if len(names) > 1 else "") + row_name(row, pair) for s, row, pair in rows]

    def repetitions(self) -> dict[str, list[list[str]]]:
        """Groups of rows to train on and, where it is of the same source, to validate on."""
        found: Repetitions = repetitions(self.train)
        return {name: [self.places(self.train, group) for group in groups] for name, groups in vars(found).items()}

    def both_sides(self) -> list[str]:
        """The prompts that are both trained on and validated on, by their rows to train on."""
        both = np.intersect1d(column(self.train, "prompt_hash"), column(self.val, "prompt_hash"))
        return self.places(self.train, np.flatnonzero(np.isin(column(self.train, "prompt_hash"), both)).tolist())

    def sampled_texts(self) -> dict[int, str]:
        """Prompt and answers of some pairs to train on, from their sources, by their numbers in the table."""
        numbers = np.arange(0, len(self.train), max(1, len(self.train) // SAMPLED))
        places = self.train.select_columns(["source", "row", "pair"]).with_format("numpy")[numbers]
        texts: dict[int, str] = {}
        for source, part in enumerate(self.parts):
            mine = places["source"] == source
            compiler = Compiler(part.format, self.data.encoder, self.pairwise)
            rows = part.rows.select(places["row"][mine])
            for number, pair, row in zip(numbers[mine], places["pair"][mine], rows, strict=True):
                result = next(result for which, _, result in compiler.read(row) if which == pair)
                texts[int(number)] = "\n".join(filter(None, (result.prompt, result.chosen, result.rejected)))
        return texts

    def checks(self) -> Iterator[Check]:
        """EOS, BOS, special tokens in texts, the boundary, and the chat template."""
        tokenizer, encoder = self.tokenizer, self.data.encoder
        used = len(self.train) + len(self.val)
        tables = [self.train, self.val]
        if encoder.eos is None:
            yield Check(False, "The tokenizer has no EOS token: answers have no end that could be learned")
        else:
            parts = ("chosen", "rejected") if self.pairwise else ("chosen",)
            ended = sum(int((last_ids(table, part) == encoder.eos).sum()) for table in tables for part in parts)
            cut = len(parts) * used - ended
            but = f" but the {cut:,} that are cut" if cut else ""
            yield Check(True, f"EOS {tokenizer.eos_token!r} ({encoder.eos}) ends every answer{but}, and is in the loss")
        templated = sum(int(column(table, "templated").sum()) for table in tables)
        written = (
            templated
            and self.train[0]["templated"]
            and self.train[0]["prompt"][: len(encoder.prefix)] == encoder.prefix
        )
        if encoder.prefix and templated and not written:
            yield Check(
                False, "The tokenizer puts BOS before a text, but the chat template does not: the template is followed"
            )
        elif encoder.prefix:
            yield Check(True, f"BOS {tokenizer.decode(encoder.prefix)!r} begins every prompt, once")
        else:
            yield Check(True, "The tokenizer puts no BOS before a text, so that there is none")
        if templated:
            yield Check(True, f"{templated:,} pairs are conversations, written by the tokenizer's chat template")
        elif tokenizer.chat_template is not None:
            yield Check(
                False, "The tokenizer has a chat template, but the rows are plain text, which does not go through it"
            )
        else:
            yield Check(True, "The rows are plain text, and the tokenizer has no chat template")
        spelled = sum(special_in_text(table, tokenizer, len(encoder.prefix)) for table in tables)
        if not templated:
            said = (
                f"{spelled:,} pairs have a special token written in their text"
                if spelled
                else "No text holds a special token"
            )
            yield Check(not spelled, said)
        merged = sum(len(remarked(table, "boundary")) for table in tables)
        if merged:
            yield Check(
                merged < 0.01 * used,
                f"In {merged:,} of {used:,} pairs a token would merge prompt and answer; it was split there",
            )
        else:
            yield Check(True, "No token merges prompt and answer")
        unfaithful = sum(len(remarked(table, "text")) for table in tables)
        if unfaithful:
            yield Check(False, f"The ids of {unfaithful:,} of {used:,} pairs do not spell their text")
        else:
            yield Check(True, "The ids of every pair, decoded, are its text")

    def samples(self) -> list[Sample]:
        """Three pairs: a short, a middling and a long one."""
        order = np.argsort(column(self.train, "prompt_tokens") + column(self.train, "chosen_tokens"), kind="stable")
        places = dict.fromkeys(int(order[int(share * (len(order) - 1))]) for share in (0.1, 0.5, 0.9))
        return [self.sample(number) for number in places]

    def sample(self, number: int) -> Sample:
        """One pair's tokens."""
        line = self.train[number]
        tokens, hidden = {}, {}
        for part in PARTS:
            ids = line[part]
            shown = ids[-SHOWN:] if part == "prompt" else ids[:SHOWN]
            hidden[part] = len(ids) - len(shown)
            # An answer's first token is predicted by the prompt's last; behind an empty prompt nothing predicts it.
            unscored = len(ids) if part == "prompt" else int(not line["prompt"])
            tokens[part] = [Token(text, part, n >= unscored) for n, text in enumerate(pieces(self.tokenizer, shown))]
        return Sample(self.places(self.train, [number])[0], {p: t for p, t in tokens.items() if t}, hidden)


def last_ids(table: Dataset, part: str) -> np.ndarray:
    """`[P]` the last token of each answer."""
    cells = arrow(table, part).combine_chunks()
    return cells.values.to_numpy()[cells.offsets.to_numpy()[1:] - 1]


def short_names(names: list[str]) -> list[str]:
    """The last parts of some paths, or the paths where these would be the same.

    >>> short_names(["a/rows.jsonl", "b/pairs.jsonl"]), short_names(["a/rows.jsonl", "b/rows.jsonl"])
    (['rows.jsonl', 'pairs.jsonl'], ['a/rows.jsonl', 'b/rows.jsonl'])
    """
    last = [Path(name).name for name in names]
    return last if len({*last}) == len({*names}) else names


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it; of a character in several tokens the last one has it all."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = text.rstrip("\ufffd") if end < len(ids) else text
        found.append(whole[len(before) :] or "…")
        before = max(before, whole, key=len)  # bytes of the next character can take the last one back for a while
    return found


def special_in_text(table: Dataset, tokenizer: PreTrainedTokenizerBase, prefix: int) -> int:
    """Pairs whose prompt, behind BOS, or whose answers, before EOS, hold a special token."""
    special = np.array(tokenizer.all_special_ids)
    found = np.zeros(len(table), dtype=bool)
    for part, (start, end) in zip(PARTS, ((prefix, 0), (0, 1), (0, 1)), strict=True):
        cells = arrow(table, part).combine_chunks()
        offsets = cells.offsets.to_numpy()
        hits = np.isin(cells.values.to_numpy(), special)
        count = np.concatenate([[0], np.cumsum(hits)])
        first, last = np.minimum(offsets[:-1] + start, offsets[1:]), np.maximum(offsets[1:] - end, offsets[:-1])
        found |= count[np.maximum(last, first)] > count[first]
    return int(found.sum())
