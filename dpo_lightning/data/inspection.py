"""Everything that `inspect` tells of a source, as plain values: what is in it, what will be cut, what looks wrong."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpo_lightning.data.characters import Oddity, languages, oddities
from dpo_lightning.data.compiler import Compiler, column, remarked, row_name
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
from dpo_lightning.data.preference import Conversation, Preference
from dpo_lightning.data.tables import Part
from dpo_lightning.data.token_checks import Check, token_checks

#: Pairs whose characters, and whose language, are looked at; spread evenly over the table.
SAMPLED, CLASSIFIED = 5_000, 250

#: Other limits that the report tells the cuts of.
LIMITS = (256, 512, 1024, 2048, 4096, 8192)

#: What a token is shown as that is only a part of a character.
PART = "\u25af"

#: Rows that a reason names; the ledger has all.
NAMED = 1_000

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
    shortest: int


@dataclass(frozen=True)
class Reason:
    """What was done to rows for one reason, with the places of the first of them in words."""

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
class Inspection:
    """What was found."""

    sources: list[SourceSummary]
    bad_rows: float
    reasons: list[Reason]
    note: str
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
        self.spelled = 0  # pairs in whose texts a special token is written
        self.pairwise = bool(column(self.train, "rejected_tokens").any())

    def __call__(self) -> Inspection:
        """Everything."""
        lengths = lengths_of(part.lines for parts in self.data.parts.values() for part in parts)
        prompt, *answers = (column(self.train, f"{part}_tokens") for part in PARTS)
        texts = self.sampled_texts()
        classified = list(texts)[:: max(1, len(texts) // CLASSIFIED)]
        return Inspection(
            sources=[self.source(part, split) for split, parts in self.data.parts.items() for part in parts],
            bad_rows=self.data.bad_rows,
            reasons=self.reasons(),
            note=self.note(),
            train=len(self.train),
            val=len(self.val),
            max_length=self.max_length,
            truncation=self.data.truncation,
            lengths=lengths,
            cuts=cuts(lengths, self.limits(lengths), drop=self.data.truncation == "drop"),
            layout=self.data.layout,
            batch_size=self.data.batch_size,
            costs=layout_costs(prompt, answers if lengths.pairwise else answers[:1], self.data.batch_size),
            prompts=len(np.unique(column(self.train, "prompt_hash"))),
            repetitions=self.repetitions(),
            both_sides=self.both_sides(),
            bias=length_bias(lengths_of([self.train, self.val])) if lengths.pairwise else None,
            checks=list(token_checks([self.train, self.val], self.data.encoder, self.spelled, len(texts))),
            samples=self.samples(),
            looked_at=len(texts),
            classified=len(classified),
            languages=languages([texts[number] for number in classified]),
            oddities=[(odd, self.places(self.train, odd.first)) for odd in oddities(texts)],
        )

    def note(self) -> str:
        """What the figures are of, where it is not all pairs of the sources, each once an epoch."""
        if self.data.streaming:
            read = ", ".join(f"{len(part.rows):,} of {Path(part.name).name}" for part in self.parts)
            return f"Of a stream only the first rows are read: {read}"
        return "" if self.data.weights is None else self.data.epoch_summary()

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
        prompts = column(part.lines, "whole_prompt")[column(part.lines, "whole_chosen") > 0]
        shortest = int(prompts.min(initial=np.iinfo(np.int32).max))
        return SourceSummary(
            part.name, split, name, len(part.rows), pairs, pairs - dropped, dropped, bad, cut, shortest
        )

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
            some = group.head(NAMED)
            places = [
                (f"{short[source]} " if len(names) > 1 else "") + row_name(row, pair)
                for source, row, pair in zip(some["source"], some["row"], some["pair"], strict=True)
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
        special = [] if getattr(self.tokenizer, "split_special_tokens", False) else self.tokenizer.all_special_tokens
        for source, part in enumerate(self.parts):
            mine = places["source"] == source
            compiler = Compiler(part.format, self.data.encoder, self.pairwise)
            rows = part.rows.select(places["row"][mine])
            for number, pair, row in zip(numbers[mine], places["pair"][mine], rows, strict=True):
                original, result = next((o, result) for which, o, result in compiler.read(row) if which == pair)
                self.spelled += spells(original, special, self.tokenizer)
                texts[int(number)] = "\n".join(filter(None, (result.prompt, result.chosen, result.rejected)))
        return texts

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


def spells(pair: Preference | Conversation, special: list[str], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a special token is written in a pair's texts, other than BOS or EOS where that would be put anyway."""
    if isinstance(pair, Conversation):
        prompts = [str(turn.get("content", "")) for turn in pair.prompt]
    else:
        prompts = [pair.prompt.removeprefix(tokenizer.bos_token or "")]
    answers = [answer.removesuffix(tokenizer.eos_token or "") for answer in (pair.chosen, pair.rejected) if answer]
    return any(token in text for text in (*prompts, *answers) for token in special)


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
        found.append(whole[len(before) :] or PART)
        before = max(before, whole, key=len)  # bytes of the next character can take the last one back for a while
    return found
