"""Preference data for a trainer: from a source's name to batches on each rank."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dpo_lightning.data import oracle as oracles
from dpo_lightning.data import world
from dpo_lightning.data.batching import BatchPlan, PlannedBatch
from dpo_lightning.data.chat import use_template
from dpo_lightning.data.checks import check_endless, check_same_plan, check_streaming, check_weights, check_windows
from dpo_lightning.data.compiler import LEDGER, column, remarked, row_name
from dpo_lightning.data.formats import named
from dpo_lightning.data.mixing import Mixture
from dpo_lightning.data.oracle import Oracle
from dpo_lightning.data.packing import LayoutChoice, PreferenceBatch
from dpo_lightning.data.pairs import TokenizedPairs
from dpo_lightning.data.splits import STREAMED_ROWS, find_splits, materialised, split_by_prompt, with_spare
from dpo_lightning.data.streams import StreamedPairs, StreamedSource
from dpo_lightning.data.tables import Part, Reader, append_ledger, read_ledger
from dpo_lightning.data.tokenization import PairTokenizer, Truncation
from dpo_lightning.errors import InputError

#: One prompt to be answered: its id, and its token ids `[Lp]`.
Prompt = tuple[int, np.ndarray]

#: Share of the prompts that validates where nothing else is named.
DEFAULT_FRACTION = 0.05

#: Longest sequence where neither the user nor the model's context says otherwise.
DEFAULT_LENGTH = 1024

#: What was done to rows, in words.
WORDS = {
    "dropped": "rows dropped",
    "cut": "rows cut",
    "boundary": "rows with a token merged across the prompt's end",
    "text": "rows whose ids do not spell their text",
}

#: Batches among which the largest is looked for before the first step: three seconds at most.
PLANNED = 50_000

#: Pairs of a stream that are shuffled at once.
DEFAULT_BUFFER = 10_000


class PreferenceDataModule(LightningDataModule):
    """Pairs of answers that people preferred and rejected.

    Validation is what is named; else the source's own validation or test split; else a twentieth of the prompts, chosen
    by a hash of their text, so that no prompt is on both sides.

    Args:
        source: a hub id, a folder, or a .jsonl, .json, .csv or .parquet file (gzipped too), or a list of them.
        weights: shares of the sources in a list among the pairs of an epoch, which ends before a pair would come twice.
            Default: every pair of every source.
        train_split: the split to train on.
        val_split: the split of the source to validate on.
        val_source: another source to validate on.
        val_fraction: share of the source's prompts to validate on, in (0, 1).
        format: how a row becomes preferences: triples, dialogues, messages and others (docs/data.md), or the import
            path of a function row -> dpo_lightning.data.preference.Preference. Default: by the columns.
        chat_template: a file with the template for conversations, which is exported with the tokenizer. Default: the
            tokenizer's own.
        batch_size: pairs per device and micro-batch.
        max_length: most tokens of prompt + one answer + EOS. Default: 1024, or the model's context if that is shorter.
        truncation: what a longer pair loses: keep_end cuts the prompt's start, keep_start its end, drop drops the pair.
            A prompt keeps half of max_length; what is still too long is cut from the answers. Default: keep_end, and an
            error where that would cut every prompt.
        layout: how pairs are laid out in rows: shared has the prompt once for both answers, packed once for each,
            padded has one row an answer. auto takes the first that the model can run.
        bad_rows: largest share of rows that may be dropped because they cannot be used.
        num_workers: processes that tokenize, and that prepare batches.
        streaming: read the source while training, a window of pairs at a time: for what is too large to be read first.
        shuffle_buffer: pairs of a stream's window, which are in memory and shuffled together. Default: 10,000.
        max_train_pairs: train on the first so many pairs only.
        max_val_pairs: validate on the first so many pairs only.
        max_test_prompts: `test` asks the first so many prompts of the source's own test split, or of the pairs to
            validate on where that is what they are or there is none.
        oracle: import path of a function (prompt, answer) -> float that knows how good an answer truly is, for `test`.
            Default: the built-in world's for the built-in world, else none.
    """

    def __init__(
        self,
        source: str | list[str],
        weights: list[float] | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        val_source: str | list[str] | None = None,
        val_fraction: float | None = None,
        format: str | None = None,
        chat_template: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        truncation: Truncation | None = None,
        layout: LayoutChoice = "auto",
        bad_rows: float = 0.01,
        num_workers: int = 0,
        streaming: bool = False,
        shuffle_buffer: int | None = None,
        max_train_pairs: int | None = None,
        max_val_pairs: int | None = None,
        max_test_prompts: int = 512,
        oracle: str | None = None,
    ) -> None:
        super().__init__()
        validation = {"val_split": val_split, "val_source": val_source, "val_fraction": val_fraction}
        chosen = [f"data.{name}" for name, value in validation.items() if value is not None]
        if len(chosen) > 1:
            raise InputError(f"{' and '.join(chosen)} each name the validation set; keep one of them")
        if val_split == train_split:
            raise InputError(f"data.val_split and data.train_split are both {val_split!r}; validate on other pairs")
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise InputError(f"data.val_fraction must be between 0 and 1, got {val_fraction}")
        if not 0 <= bad_rows <= 1:
            raise InputError(f"data.bad_rows must be a share from 0 to 1, got {bad_rows}")
        counts = {"batch_size": batch_size, "max_train_pairs": max_train_pairs, "max_val_pairs": max_val_pairs}
        counts |= {"max_test_prompts": max_test_prompts, "shuffle_buffer": shuffle_buffer}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise InputError(f"data.{name} must be at least 1, got {count}")
        if num_workers < 0:
            raise InputError(f"data.num_workers must not be negative, got {num_workers}")
        if source == [] or val_source == []:
            raise InputError("data.source and data.val_source name at least one source; the list is empty")
        self.sources = [source] if isinstance(source, str) else source
        check_weights(weights, self.sources)
        check_streaming(streaming, self.sources, val_fraction, num_workers, shuffle_buffer)
        self.val_sources = [val_source] if isinstance(val_source, str) else val_source
        self.train_split, self.val_split, self.val_fraction = train_split, val_split, val_fraction
        self.weights = weights
        self.format = None if format is None else named(format)
        self.chat_template = chat_template
        self.batch_size = batch_size
        self.max_length = max_length
        self.truncation = truncation
        self.layout: LayoutChoice = layout
        self.bad_rows = bad_rows
        self.num_workers = num_workers
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer or DEFAULT_BUFFER
        self.max_train_pairs, self.max_val_pairs = max_train_pairs, max_val_pairs
        self.max_test_prompts = max_test_prompts
        self.oracle_name = oracle
        self.oracle: Oracle | None = None if oracle is None else oracles.named(oracle)
        if oracle is None and val_source is None and all(name.startswith(world.SCHEME) for name in self.sources):
            self.oracle = oracles.named(f"{oracles.__name__}.figures")
        self._noise_known = False  # of the labels that validate
        self.tables: dict[str, Dataset] = {}
        self.parts: dict[str, list[Part]] = {}
        self.streams: list[StreamedSource] = []
        self.ledger = LEDGER.empty_table()
        self.streamed: Counter[str] = Counter()  # what was done to a stream's rows so far
        self.ledger_file: Path | None = None  # where what a stream drops and cuts is written as it is read
        self._resumed: dict[str, Any] | None = None

    def compile(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        pairwise: bool = True,
        testing: bool = False,
        inspecting: bool = False,
    ) -> None:
        """Read, check, tokenize and split; afterwards `tables` has `train` and `val`, and `test` if that is asked for.

        Args:
            tokenizer: of the model.
            context: longest sequence that the model can read, None where it has no limit.
            pairwise: whether the loss looks at rejected answers.
            testing: whether prompts are needed to sample answers to.
            inspecting: compile a stream's first window as a table, and bad rows however many there are.

        Raises:
            InputError: if a source, a row or an option cannot be used.
        """
        length = self.max_length if self.max_length is not None else min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
        if length < 2 or (context is not None and length > context):
            raise InputError(
                f"data.max_length is {length}, but the model reads between 2 and {context} tokens; change it"
            )
        if self.chat_template is not None:
            use_template(tokenizer, self.chat_template)
        self.encoder = encoder = PairTokenizer(tokenizer, length, self.truncation or "keep_end")
        reader = Reader(
            encoder,
            pairwise,
            format=self.format,
            bad_rows=1.0 if inspecting else self.bad_rows,
            look_first=inspecting or self.bad_rows < 1,
            refuse_cuts=self.truncation is None and not inspecting,
            processes=self.num_workers,
        )
        splits = find_splits(
            self.sources, self.train_split, self.val_split, self.val_sources, self.val_fraction, self.streaming
        )
        if self.streaming and splits.val is None:
            raise InputError(
                f"{', '.join(self.sources)}: has no split of its own to validate on, and a stream cannot be split; set "
                "data.val_source, or data.val_split"
            )
        tables: dict[str, Dataset] = {}
        if self.streaming and not inspecting:
            self.streams = reader.streams(splits.train, self._keep)
        else:
            tables["train"] = reader.table(
                materialised(splits.train, self.shuffle_buffer), "train" if splits.val else "all"
            )
        if splits.val is None:
            tables["train"], tables["val"] = split_by_prompt(
                tables["train"], self.val_fraction or DEFAULT_FRACTION, ", ".join(self.sources)
            )
        else:
            tables["val"] = reader.table(materialised(splits.val, with_spare(self.max_val_pairs)), "val")
        most = {"val": self.max_val_pairs} | ({} if self.weights else {"train": self.max_train_pairs})
        for name in most.keys() & tables.keys():
            tables[name] = tables[name].select(range(min(len(tables[name]), most[name] or len(tables[name]))))
        if testing:
            test = materialised(splits.test, with_spare(self.max_test_prompts))
            tables["test"] = reader.table(test, "test") if test else tables["val"]
            if self.oracle_name is None and len(remarked(tables["test"], "cut")):
                self.oracle = None  # what is left of a question is none of the world's
        self.tables, self.parts, self.ledger = tables, reader.parts, reader.ledger
        if self.chat_template is not None and not reader.conversations:
            raise InputError(
                "data.chat_template is given, but no row is a conversation; remove it, or set data.format "
                "triples_as_chat to make prompts and answers turns of one"
            )
        if reader.conversations and self.truncation == "keep_start":
            raise InputError(
                "data.truncation keep_start would cut off the generation prompt, with which a conversation's prompt "
                "ends; choose keep_end or drop"
            )
        whole = not len(remarked(tables["val"], "cut"))  # what is left of a cut answer has another reward
        self._noise_known = pairwise and self.sources == [world.PAIRS] and self.val_sources is None and whole
        rank_zero_info(self.summary(length, encoder.eos is not None))

    @cached_property
    def best_accuracy(self) -> float | None:
        """The accuracy of one who knows every reward; None where the labels' noise is not known.

        It takes a second, which the first step need not wait for.
        """
        if not self._noise_known:
            return None
        return oracles.best_accuracy(as_text(self.tables["val"], self.encoder.tokenizer))

    def summary(self, max_length: int, ends: bool = True) -> str:
        """How many pairs train and validate, and what was dropped and cut.

        Args:
            max_length: that was asked for.
            ends: whether the tokenizer has an EOS token.
        """
        tables = self.tables
        train = f"{len(tables['train']):,} pairs" if "train" in tables else "a stream of pairs"
        parts = [f"Data: {train} to train on, {len(tables['val']):,} to validate on"]
        for action, what in (WORDS | {"cut": f"rows cut to {max_length} tokens"}).items():
            entries = self.ledger.filter(pyarrow.compute.equal(self.ledger["action"], action))
            if len(entries):
                first = [
                    f"{e['source']} {row_name(e['row'], e['pair'])}: {e['reason']}" for e in entries[:3].to_pylist()
                ]
                parts.append(f"{len(entries):,} {what} ({'; '.join(first)}{'; ...' if len(entries) > 3 else ''})")
        if self.weights is not None and "train" in tables:
            parts.append(self.epoch_summary())
        if both := self.on_both_sides():
            parts.append(f"{both:,} prompts are both trained on and validated on: the validation flatters")
        if self.streaming and self.streams:
            parts.append("Whether prompts of the stream also validate is not known")
            read = [len(part.rows) for part in self.parts["val"]]
            if self.val_sources is None and self.max_val_pairs is None and STREAMED_ROWS in read:
                parts.append(f"The first {STREAMED_ROWS:,} rows of a validation split validate; set data.max_val_pairs")
        if not ends:
            parts.append("The tokenizer has no EOS token: answers have no end to be learned; set eos_token")
        return "\n  ".join(parts)

    def epoch_summary(self) -> str:
        """How many pairs an epoch has of each source, where these have weights."""
        mixture = self._mixture()
        counts = zip(mixture.counts, self.sources, strict=True)
        return f"An epoch has {len(mixture):,} pairs: {', '.join(f'{count:,} of {source}' for count, source in counts)}"

    def on_both_sides(self) -> int:
        """Prompts that are both trained on and validated on; of a stream that is not known."""
        if "train" not in self.tables:
            return 0
        return len(np.intersect1d(*(column(self.tables[name], "prompt_hash") for name in ("train", "val"))))

    def write_ledger(self, file: Path) -> None:
        """Write what was dropped and cut, if anything was, and what a stream will drop and cut from now on.

        Once for a file: a fit that ends by validating sets up twice.
        """
        if file != self.ledger_file:
            self.ledger_file = file
            append_ledger(self.ledger, file)

    def replay_ledger(self, file: Path) -> None:
        """Take over what a stream had dropped and cut in the run that goes on, up to where it goes on."""
        if not self.streaming or self._resumed is None or not file.exists() or self.ledger_file is None:
            return
        state = self._resumed["stream"]
        lines = read_ledger(file)
        lines = lines.filter(pyarrow.compute.equal(lines["split"], "train"))
        if not state["epoch"]:
            places = dict(zip(self.sources, state["window"]["places"], strict=True))
            before = [
                (row, pair) < (places[source]["row"], places[source]["pair"])
                for source, row, pair in zip(
                    *(lines[name].to_pylist() for name in ("source", "row", "pair")), strict=True
                )
            ]
            lines = lines.filter(pyarrow.array(before, pyarrow.bool_()))
        self._keep(lines)

    def _keep(self, lines: pyarrow.Table) -> None:
        """Count what was done to a stream's rows, and add it to the ledger."""
        self.streamed.update(lines["action"].to_pylist())
        if self.ledger_file is not None:
            append_ledger(lines, self.ledger_file)

    def stream_summary(self) -> str:
        """What was done to the rows of the stream so far; empty where nothing was, or there is no stream."""
        done = ", ".join(f"{count:,} {WORDS[action]}" for action, count in self.streamed.items())
        return f"Of the stream so far: {done}" if done else ""

    # Lightning's side

    def prepare_data(self) -> None:
        self.setup("prepare")

    def setup(self, stage: str) -> None:
        if not self.tables:
            module = self.trainer.lightning_module
            self.compile(module.tokenizer, module.context, module.loss.pairwise, self.trainer.testing)

    def train_dataloader(self) -> DataLoader[PreferenceBatch]:
        trainer = self.trainer
        check_windows(trainer)
        if self.streaming:
            check_endless(trainer)
            self.stream = self._stream(self.streams, self.shuffle_buffer, self.weights)
            if self._resumed is not None:
                check_same_plan(self._resumed["plan"], self._shape())
                self.stream.resume(self._resumed["stream"])
            return self._loader(self.stream)
        pairs = self._pairs("train")
        self.plan = BatchPlan(
            pairs.costs,
            self.batch_size,
            ranks=trainer.world_size,
            rank=trainer.global_rank,
            accumulate=trainer.accumulate_grad_batches,
            seed=seed(),
            shuffle=True,
            order=self._mixture(),
        )
        if self._resumed is not None:
            check_same_plan(self._resumed["plan"], self._shape())
            self.plan.resume(*self._resumed["position"])
        return self._loader(pairs, self.plan)

    def first_batch(self) -> PreferenceBatch:
        """This rank's first batch of the first epoch, whatever the loader is doing; of a stream, its first pairs."""
        if self.streaming:
            places = [source.place for source in self.streams]
            batch = next(iter(self._stream(self.streams, 1, weights=None)))
            for source, place in zip(self.streams, places, strict=True):
                source.start(place)
            return batch
        return self._pairs("train")[next(self.plan.batches(0))]

    def largest_batch(self) -> PreferenceBatch:
        """The batch of most tokens, padding included, that this rank will train on: of the first `PLANNED`.

        Of a stream, whose lengths are not known yet, its first pairs.
        """
        if self.streaming:
            return self.first_batch()
        trainer, pairs = self.trainer, self._pairs("train")
        most = PLANNED
        if trainer.max_steps >= 0:
            most = min(most, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
        largest = max(islice(self._batches_to_come(), most), key=pairs.laid_out, default=None)
        return self.first_batch() if largest is None else pairs[largest]

    def _batches_to_come(self) -> Iterator[PlannedBatch]:
        """This rank's batches from where the run goes on, epoch by epoch."""
        trainer, each = self.trainer, int(self.trainer.num_training_batches)
        yield from islice(self.plan, each)
        last = trainer.max_epochs if trainer.max_epochs not in (None, -1) else sys.maxsize
        for epoch in range(self.plan.epoch + 1, last):
            yield from islice(self.plan.batches(epoch), each)

    def _mixture(self) -> Mixture | None:
        if self.weights is None:
            return None
        return Mixture(column(self.tables["train"], "source"), self.weights, seed(), self.max_train_pairs)

    def _stream(self, sources: list[StreamedSource], buffer: int, weights: list[float] | None) -> StreamedPairs:
        trainer, module = self.trainer, self.trainer.lightning_module
        return StreamedPairs(
            sources,
            weights,
            buffer=buffer,
            most=self.max_train_pairs,
            layout=module.policy.layout,
            pairwise=module.loss.pairwise,
            row_tokens=module.policy.attention.row_tokens,
            batch_size=self.batch_size,
            ranks=trainer.world_size,
            rank=trainer.global_rank,
            accumulate=trainer.accumulate_grad_batches,
            seed=seed(),
        )

    def places(self, split: str, ids: Sequence[int]) -> list[tuple[str, int, int]]:
        """`(source, row, pair)` of some pairs of a split."""
        chosen = self._chosen(split, ids)
        names = [part.name for part in self.parts.get(split, self.parts.get("all", ()))]
        return [(names[line["source"]], line["row"], line["pair"]) for line in chosen]

    def named_pairs(self, ids: Sequence[int]) -> list[str]:
        """Some pairs to train on in words; of a stream, whose rows have gone by, by their ids."""
        if self.streaming:
            return [f"pair {number} of the stream" for number in ids]
        return [f"{source} {row_name(row, pair)}" for source, row, pair in self.places("train", ids)]

    def texts(self, split: str, ids: Sequence[int]) -> list[dict[str, str]]:
        """Some pairs of a split, as `prompt`, `chosen` and `rejected`, without EOS."""
        return as_text(self._chosen(split, ids), self.trainer.lightning_module.tokenizer)

    def _chosen(self, split: str, ids: Sequence[int]) -> Dataset:
        table = self.tables[split]
        return table.select(np.searchsorted(column(table, "id"), ids))

    def val_dataloader(self) -> DataLoader[PreferenceBatch]:
        pairs = self._pairs("val")
        trainer = self.trainer
        plan = BatchPlan(pairs.costs, self.batch_size, ranks=trainer.world_size, rank=trainer.global_rank)
        return self._loader(pairs, plan)

    def predict_dataloader(self) -> DataLoader[PreferenceBatch]:
        """Nothing to predict: making the pairs of each split lets the reference score them."""
        for split in self.tables:
            self._pairs(split)
        return DataLoader([])

    def test_dataloader(self) -> DataLoader[list[Prompt]]:
        """Batches of prompts, which do not depend on the number of ranks; each rank has as many.

        A rank that is left without one answers another's again, which is counted once.

        Raises:
            InputError: if there is no prompt that leaves room for an answer.
        """
        prompts = self.prompts("test", self.max_test_prompts)
        if not prompts:
            raise InputError(
                f"{', '.join(self.sources)}: no prompt can be answered: each is empty, or too long for an answer of "
                f"{self.trainer.lightning_module.answer_tokens} tokens; lower model.max_new_tokens"
            )
        prompts = sorted(prompts, key=lambda prompt: len(prompt[1]))
        batches = [prompts[start : start + self.batch_size] for start in range(0, len(prompts), self.batch_size)]
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        rounds = -(-len(batches) // ranks)
        mine = [batches[(start * ranks + rank) % len(batches)] for start in range(rounds)]
        return DataLoader(mine, batch_size=None, collate_fn=as_it_is)

    def prompts(self, split: str, most: int) -> list[Prompt]:
        """The first `most` different prompts of a split that can be answered; how many cannot is said.

        A prompt without a token has nothing to start from, and one that leaves no room for a whole answer in the
        model's context would get a shorter one than others.
        """
        module, table = self.trainer.lightning_module, self.tables[split]
        _, first = np.unique(column(table, "prompt_hash"), return_index=True)
        first = np.sort(first)
        lengths = column(table, "prompt_tokens")[first]
        usable = (lengths > 0) & (lengths + module.answer_tokens <= (module.context or np.inf))
        if not usable.all():
            rank_zero_info(
                f"{np.count_nonzero(~usable):,} of {len(usable):,} prompts are not answered: empty, or without room "
                f"for an answer of {module.answer_tokens} tokens in the model's context of {module.context}"
            )
        chosen = table.select(first[usable][:most]).with_format("numpy")
        return [(int(pair["id"]), pair["prompt"]) for pair in chosen]

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is: `(epoch, batches of it already trained on)`, and in which plan.

        Kept here because Lightning drops a stateful loader's state once the number of steps was asked for (#20550).
        """
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        if self.streaming:
            return {"stream": self.stream.state(done), "plan": self._shape()}
        batches = int(self.trainer.num_training_batches)
        position = divmod(self.trainer.current_epoch * batches + done, batches)
        return {"position": position, "plan": self._shape()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def _shape(self) -> dict[str, int]:
        """What the order of the pairs and the size of a step depend on."""
        trainer = self.trainer
        names = {"data.batch_size": self.batch_size, "ranks": trainer.world_size, "seed_everything": seed()}
        names |= {"trainer.accumulate_grad_batches": trainer.accumulate_grad_batches}
        return names if self.streaming else names | {"pairs to train on": len(self.plan.order)}

    def _pairs(self, split: str) -> TokenizedPairs:
        module = self.trainer.lightning_module
        policy = module.policy
        pairs = TokenizedPairs(
            self.tables[split], policy.layout, module.loss.pairwise, row_tokens=policy.attention.row_tokens
        )
        return module.attach(pairs, split)

    def _loader(
        self, pairs: TokenizedPairs | StreamedPairs, plan: BatchPlan | None = None
    ) -> DataLoader[PreferenceBatch]:
        return DataLoader(
            pairs,
            sampler=plan,
            batch_size=None,  # a planned batch is one item
            collate_fn=as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )


def seed() -> int:
    """Where `seed_everything` leaves it."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def as_it_is(batch: Any) -> Any:
    return batch


def as_text(table: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """The pairs of a table as `prompt`, `chosen` and `rejected`, without EOS."""
    return [
        {name: tokenizer.decode(row[name], skip_special_tokens=True) for name in ("prompt", "chosen", "rejected")}
        for row in table
    ]
