"""Preference data for a trainer: from a source's name to batches on each rank."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dpo_lightning.data import oracle as oracles
from dpo_lightning.data import world
from dpo_lightning.data.batching import BatchPlan
from dpo_lightning.data.compiler import LedgerLine, column, compile_rows, drop_faults, ledger
from dpo_lightning.data.formats import named, recognise
from dpo_lightning.data.oracle import Oracle
from dpo_lightning.data.packing import LayoutChoice, PreferenceBatch
from dpo_lightning.data.pairs import TokenizedPairs
from dpo_lightning.data.sources import choose_split, own_validation, read
from dpo_lightning.data.tokenization import PairTokenizer, Truncation
from dpo_lightning.errors import InputError

#: `(name, rows)` of some sources.
Parts = list[tuple[str, Dataset]]

#: One prompt to be answered: its row in the source, and its ids `[Lp]`.
Prompt = tuple[int, np.ndarray]

#: Share of the prompts that validates where nothing else is named.
DEFAULT_FRACTION = 0.05

#: Longest sequence where neither the user nor the model's context says otherwise.
DEFAULT_LENGTH = 1024


class PreferenceDataModule(LightningDataModule):
    """Pairs of answers that people preferred and rejected.

    Validation is what is named; else the source's own validation or test split; else a twentieth of the prompts, chosen
    by a hash of their text, so that no prompt is on both sides.

    Args:
        source: a hub id, a folder, or a .jsonl, .json, .csv or .parquet file (gzipped too), or a list of them.
        train_split: the split to train on.
        val_split: the split of the source to validate on.
        val_source: another source to validate on.
        val_fraction: share of the source's prompts to validate on, in (0, 1).
        format: how a row becomes a preference: triples, dialogues, answers, or the import path of a function
            row -> dpo_lightning.data.formats.Preference. Default: by the columns.
        batch_size: pairs per device and micro-batch.
        max_length: most tokens of prompt + one answer + EOS. Default: 1024, or the model's context if that is shorter.
        truncation: what a longer pair loses: keep_end cuts the prompt's start, keep_start its end, drop drops the pair.
            A prompt keeps half of max_length; what is still too long is cut from the answers. Default: keep_end, and an
            error where that would cut every prompt.
        layout: how pairs are laid out in rows: shared has the prompt once for both answers, packed once for each,
            padded has one row an answer. auto takes the first that the model can run.
        bad_rows: largest share of rows that may be dropped because they cannot be used.
        num_workers: processes that prepare batches.
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
        train_split: str = "train",
        val_split: str | None = None,
        val_source: str | list[str] | None = None,
        val_fraction: float | None = None,
        format: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        truncation: Truncation | None = None,
        layout: LayoutChoice = "auto",
        bad_rows: float = 0.01,
        num_workers: int = 0,
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
        counts["max_test_prompts"] = max_test_prompts
        for name, count in counts.items():
            if count is not None and count < 1:
                raise InputError(f"data.{name} must be at least 1, got {count}")
        if num_workers < 0:
            raise InputError(f"data.num_workers must not be negative, got {num_workers}")
        if source == [] or val_source == []:
            raise InputError("data.source and data.val_source name at least one source; the list is empty")
        self.sources = [source] if isinstance(source, str) else source
        self.val_sources = [val_source] if isinstance(val_source, str) else val_source
        self.train_split, self.val_split, self.val_fraction = train_split, val_split, val_fraction
        self.format = None if format is None else named(format)
        self.batch_size = batch_size
        self.max_length = max_length
        self.truncation = truncation
        self.layout: LayoutChoice = layout
        self.bad_rows = bad_rows
        self.num_workers = num_workers
        self.max_train_pairs, self.max_val_pairs = max_train_pairs, max_val_pairs
        self.max_test_prompts = max_test_prompts
        self.oracle_name = oracle
        self.oracle: Oracle | None = None if oracle is None else oracles.named(oracle)
        if oracle is None and val_source is None and all(name.startswith(world.SCHEME) for name in self.sources):
            self.oracle = oracles.named(f"{oracles.__name__}.figures")
        self.best_accuracy: float | None = None
        self.tables: dict[str, Dataset] = {}
        self.ledger: list[LedgerLine] = []
        self._resumed: dict[str, Any] | None = None

    def compile(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        pairwise: bool = True,
        testing: bool = False,
    ) -> None:
        """Read, check, tokenize and split; afterwards `tables` has `train` and `val`, and `test` if that is asked for.

        Args:
            tokenizer: of the model.
            context: longest sequence that the model can read, None where it has no limit.
            pairwise: whether the loss looks at rejected answers.
            testing: whether prompts are needed to sample answers to.

        Raises:
            InputError: if a source, a row or an option cannot be used.
        """
        length = self.max_length if self.max_length is not None else min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
        if length < 2 or (context is not None and length > context):
            raise InputError(
                f"data.max_length is {length}, but the model reads between 2 and {context} tokens; change it"
            )
        encoder = PairTokenizer(tokenizer, length, self.truncation or "keep_end")
        self.ledger = []
        train, val, test = self._splits()
        tables = {"train": self._table(train, "train" if val else "all", encoder, pairwise)}
        if val is None:
            tables["train"], tables["val"] = split_by_prompt(
                tables["train"], self.val_fraction or DEFAULT_FRACTION, ", ".join(self.sources)
            )
        else:
            tables["val"] = self._table(val, "val", encoder, pairwise)
        for name, most in (("train", self.max_train_pairs), ("val", self.max_val_pairs)):
            tables[name] = tables[name].select(range(min(len(tables[name]), most or len(tables[name]))))
        if testing:
            tables["test"] = self._table(test, "test", encoder, pairwise) if test else tables["val"]
            if self.oracle_name is None and any(tables["test"]["cut"][:]):
                self.oracle = None  # what is left of a question is none of the world's
        self.tables = tables
        whole = not any(tables["val"]["cut"][:])  # what is left of a cut answer has another reward
        if pairwise and self.sources == [world.PAIRS] and self.val_sources is None and whole:
            self.best_accuracy = oracles.best_accuracy(as_text(tables["val"], tokenizer))
        rank_zero_info(self.summary(length))

    def summary(self, max_length: int) -> str:
        """How many pairs train and validate, and what was dropped and cut."""
        parts = [f"Data: {len(self.tables['train']):,} pairs to train on, {len(self.tables['val']):,} to validate on"]
        for action in ("dropped", "cut", "boundary"):
            entries = [line for line in self.ledger if line.action == action]
            if entries:
                what = "with a token merged across the prompt's end" if action == "boundary" else action
                at = f" to {max_length} tokens" if action == "cut" else ""
                first = "; ".join(f"{line.source} row {line.row}: {line.reason}" for line in entries[:3])
                parts.append(f"{len(entries):,} rows {what}{at} ({first}{'; ...' if len(entries) > 3 else ''})")
        both = np.intersect1d(*(column(self.tables[name], "prompt_hash") for name in ("train", "val")))
        if len(both):
            parts.append(f"{len(both):,} prompts are both trained on and validated on: the validation flatters")
        return "\n  ".join(parts)

    def _splits(self) -> tuple[Parts, Parts | None, Parts]:
        """`(name, rows)` of each source to train on, to validate on and to test on.

        None to validate on where the first are to be split; none to test on where the prompts are those of validation.
        """
        read_splits = [(source, read(source)) for source in self.sources]
        train = [(s, choose_split(splits, self.train_split, s, "data.train_split")) for s, splits in read_splits]
        others = [(s, {n: rows for n, rows in splits.items() if n != self.train_split}) for s, splits in read_splits]
        own = [(s, own_validation(splits)) for s, splits in others]
        val: Parts | None
        if self.val_sources is not None:
            own, val = [], [(source, only_split(read(source), source)) for source in self.val_sources]
        elif self.val_fraction is not None:
            own, val = [], None
        elif self.val_split is not None:
            own = [(s, self.val_split) for s, _ in read_splits]
            val = [(s, choose_split(splits, self.val_split, s, "data.val_split")) for s, splits in read_splits]
        else:
            val = [(s, splits[name]) for (s, splits), (_, name) in zip(others, own, strict=True) if name] or None
        test = [(s, splits["test"]) for s, splits in others if "test" in splits and (s, "test") not in own]
        return train, val, test

    def _table(self, parts: Parts, split: str, encoder: PairTokenizer, pairwise: bool) -> Dataset:
        """The usable rows of all parts; `row` counts on from part to part."""
        tables, first = [], 0
        for source, rows in parts:
            if not len(rows):
                raise InputError(f"{source}: the split to {'validate' if split == 'val' else 'train'} on is empty")
            format = self.format or recognise(rows.column_names, source)
            table = compile_rows(rows, source, format, encoder, pairwise)
            self.ledger += ledger(table, split, source)
            shortest = encoder.max_length if self.truncation is None else None
            usable = drop_faults(table, source, self.bad_rows, shortest)
            if first:
                usable = usable.remove_columns("row").add_column("row", column(usable, "row") + first)
            tables.append(usable)
            first += len(rows)
        return tables[0] if len(tables) == 1 else concatenate_datasets(tables)

    # Lightning's side

    def prepare_data(self) -> None:
        self.setup("prepare")

    def setup(self, stage: str) -> None:
        if not self.tables:
            module = self.trainer.lightning_module
            self.compile(module.tokenizer, module.context, module.loss.pairwise, self.trainer.testing)

    def train_dataloader(self) -> DataLoader[PreferenceBatch]:
        trainer = self.trainer
        pairs = self._pairs("train")
        self.plan = BatchPlan(
            pairs.costs,
            self.batch_size,
            ranks=trainer.world_size,
            rank=trainer.global_rank,
            accumulate=trainer.accumulate_grad_batches,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),  # where seed_everything leaves it
            shuffle=True,
        )
        check_windows(trainer)
        if self._resumed is not None:
            check_same_plan(self._resumed["plan"], self._shape())
            self.plan.resume(*self._resumed["position"])
        return self._loader(pairs, self.plan)

    def first_batch(self) -> PreferenceBatch:
        """This rank's first batch of the first epoch, whatever the loader is doing."""
        return self._pairs("train")[next(self.plan.batches(0))]

    def texts(self, split: str, rows: Sequence[int]) -> list[dict[str, str]]:
        """The pairs of a split's rows, as `prompt`, `chosen` and `rejected`, without EOS."""
        table = self.tables[split]
        places = np.searchsorted(column(table, "row"), rows)
        return as_text(table.select(places), self.trainer.lightning_module.tokenizer)

    def val_dataloader(self) -> DataLoader[PreferenceBatch]:
        pairs = self._pairs("val")
        trainer = self.trainer
        plan = BatchPlan(pairs.costs, self.batch_size, ranks=trainer.world_size, rank=trainer.global_rank)
        return self._loader(pairs, plan)

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
        return [(int(row["row"]), row["prompt"]) for row in chosen]

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is: `(epoch, batches of it already trained on)`, and in which plan.

        Kept here because Lightning drops a stateful loader's state once the number of steps was asked for (#20550).
        """
        batches = int(self.trainer.num_training_batches)
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        position = divmod(self.trainer.current_epoch * batches + done, batches)
        return {"position": position, "plan": self._shape()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def _shape(self) -> dict[str, int]:
        """What the order of the pairs and the size of a step depend on."""
        plan = self.plan
        names = {"data.batch_size": plan.batch_size, "ranks": plan.ranks, "seed_everything": plan.seed}
        return names | {"trainer.accumulate_grad_batches": plan.accumulate, "pairs to train on": len(plan.costs)}

    def _pairs(self, split: str) -> TokenizedPairs:
        module = self.trainer.lightning_module
        return TokenizedPairs(self.tables[split], module.policy.layout, module.loss.pairwise)

    def _loader(self, pairs: TokenizedPairs, plan: BatchPlan) -> DataLoader[PreferenceBatch]:
        return DataLoader(
            pairs,
            sampler=plan,
            batch_size=None,  # a planned batch is one item
            collate_fn=as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )


def as_it_is(batch: Any) -> Any:
    return batch


def as_text(table: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """The pairs of a table as `prompt`, `chosen` and `rejected`, without EOS."""
    return [
        {name: tokenizer.decode(row[name], skip_special_tokens=True) for name in ("prompt", "chosen", "rejected")}
        for row in table
    ]


def check_windows(trainer: Trainer) -> None:
    """Raises InputError where Lightning would cut an optimizer step's micro-batches short or change their number.

    The mean over a step's pairs is taken over all pairs that were planned for it.
    """
    limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
    if isinstance(limit, int) and limit % accumulate and not trainer.fast_dev_run:
        raise InputError(
            f"trainer.limit_train_batches {limit} is no multiple of trainer.accumulate_grad_batches {accumulate}: the "
            "last step would be cut short; change one of them, or set data.max_train_pairs"
        )
    if any(isinstance(c, GradientAccumulationScheduler) and len(c.scheduling) > 1 for c in trainer.callbacks):
        raise InputError("GradientAccumulationScheduler changes the pairs of a step in the middle of a run; remove it")


def check_same_plan(before: dict[str, int], now: dict[str, int]) -> None:
    """Raises InputError unless a resumed run goes through the same pairs in the same steps."""
    changed = [f"{name} {before[name]}, now {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        raise InputError(
            f"the checkpoint was written with {'; '.join(changed)}: it cannot say which pairs come next; resume with "
            "what it was written with, or start a run from its exported model"
        )


def only_split(splits: dict[str, Dataset], source: str) -> Dataset:
    """The rows of a validation source: its validation or test split, or its only one."""
    name = own_validation(splits) or (next(iter(splits)) if len(splits) == 1 else None)
    if name is None:
        raise InputError(f"{source}: none of its splits {', '.join(splits)} is for validation; give a file instead")
    return splits[name]


def split_by_prompt(table: Dataset, fraction: float, source: str) -> tuple[Dataset, Dataset]:
    """A table in two, no prompt on both sides; the second has the `fraction` of prompts whose hashes are smallest.

    Raises:
        InputError: if there is only one prompt.
    """
    hashes = column(table, "prompt_hash")
    prompts = np.unique(hashes)
    if len(prompts) < 2:
        raise InputError(f"{source}: has only one prompt, so it cannot both train and validate; name data.val_source")
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    val = hashes <= prompts[count - 1]
    return table.select(np.flatnonzero(~val)), table.select(np.flatnonzero(val))
