"""Answers that are looked at while training goes on: the same prompts, the same random numbers, another policy."""

import os
import re
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from dpo_lightning.data.datamodule import Prompt
from dpo_lightning.models.generation import generate
from dpo_lightning.training.comparison import on_one_line


class Samples(Callback):
    """Samples answers to a few validation prompts before training and at every validation, for TensorBoard.

    Args:
        count: how many prompts.

    Attributes:
        before: prompt -> answer of the policy as it started; kept in checkpoints, so that a resumed run knows it.
        now: prompt -> answer of the policy as it is.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.prompts: list[Prompt] = []
        self.before: dict[str, str] = {}
        self.now: dict[str, str] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.prompts = trainer.datamodule.prompts("val", self.count)
        if self.prompts and not self.before and trainer.ckpt_path is None:  # else it is too late to know
            self.before = self.sample(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self.prompts:
            return
        self.now = self.sample(pl_module)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("val/samples", self.as_table(), trainer.global_step)

    def sample(self, pl_module: LightningModule) -> dict[str, str]:
        """Prompt -> answer, on every rank, as sharded weights need."""
        seed, tokenizer = int(os.environ.get("PL_GLOBAL_SEED", 0)), pl_module.tokenizer
        ids = [prompt for _, prompt in self.prompts]
        keys = [(seed, row) for row, _ in self.prompts]
        answers = generate(pl_module.policy, tokenizer, ids, pl_module.answer_tokens, keys)
        texts = [tokenizer.batch_decode(part, skip_special_tokens=True) for part in (ids, answers)]
        return dict(zip(*texts, strict=True))

    def as_table(self) -> str:
        """Markdown: prompt, answer before, answer now."""
        rows = [(prompt, self.before.get(prompt, ""), answer) for prompt, answer in self.now.items()]
        cells = [" | ".join(map(as_cell, row)) for row in rows]
        return "\n".join(["| prompt | before | now |", "|---|---|---|", *(f"| {row} |" for row in cells)])

    def as_text(self) -> str:
        """The same for a terminal."""
        lines = ["", "Sampled before and after:"]
        for prompt, answer in self.now.items():
            lines += [f"  {on_one_line(prompt, keep_end=True)}"]
            lines += [f"    before: {on_one_line(self.before.get(prompt, '(unknown)'))}"]
            lines += [f"    after:  {on_one_line(answer)}"]
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]


def as_cell(text: str) -> str:
    """Any text for a cell of a table in Markdown, which shows it as it is: nothing in it is markup.

    >>> as_cell("*a* | b")
    '&#42;a&#42; &#124; b'
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "<br>".join(re.sub(r"[!-/:-@\[-`{-~]", lambda symbol: f"&#{ord(symbol.group())};", line) for line in lines)
