"""Votes as rows of a file that `fit` takes as its source."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from dpo_lightning.errors import InputError
from dpo_lightning.ui.voice import Sampling

Verdict = Literal["first", "second", "tie"]


@dataclass(frozen=True)
class Answered:
    """A prompt as the models read it, and an answer of each of two models.

    Attributes:
        prompt: the text before an answer.
        answers: the texts.
        models: whose they are.
        cut: whether an answer did not come to its own end.
    """

    prompt: str
    answers: tuple[str, str]
    models: tuple[str, str]
    cut: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Cast:
    """How many votes a file has, and on how many prompts."""

    votes: int = 0
    prompts: int = 0


def ties_of(file: Path) -> Path:
    """Where ties go, which prefer nothing: `votes.ties.jsonl` for `votes.jsonl`."""
    return file.with_suffix(f".ties{file.suffix}")


def record(file: Path, answered: Answered, verdict: Verdict, sampling: Sampling, system: Mapping[str, Any]) -> Path:
    """Append a vote, always as a line of its own; returns the file.

    Args:
        file: JSON lines with `prompt, chosen, rejected`, the time, both models and how the answers were drawn.
        answered: what was voted on.
        verdict: which answer is better; a tie goes into a file beside.
        sampling: how the answers were drawn.
        system: more columns.

    Raises:
        InputError: if the file cannot be written.
    """
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "sampling": asdict(sampling), **system}
    if verdict == "tie":
        file = ties_of(file)
        row = {"prompt": answered.prompt, "answers": answered.answers, "models": answered.models, "cut": answered.cut}
    else:
        better = 0 if verdict == "first" else 1
        row = {"prompt": answered.prompt}
        for name, number in (("chosen", better), ("rejected", 1 - better)):
            row |= {name: answered.answers[number], f"{name}_model": answered.models[number]}
            row |= {f"{name}_cut": answered.cut[number]}
    line = json.dumps({**row, **about}, ensure_ascii=False).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"), file.open("a+b") as lines:  # two tabs may vote at once
            begun = False
            if lines.seek(0, os.SEEK_END):
                lines.seek(-1, os.SEEK_END)
                begun = lines.read(1) != b"\n"
            lines.write((b"\n" if begun else b"") + line + b"\n")
    except OSError as error:
        raise InputError(f"{file}: the vote cannot be written ({error}); give --votes another file") from error
    return file


def cast(file: Path) -> Cast:
    """What is in a file of votes; nothing where there is none yet.

    Raises:
        InputError: if it is no file of votes.
    """
    if not file.exists():
        return Cast()
    try:
        with file.open(encoding="utf-8") as lines:
            prompts = [json.dumps(json.loads(line)["prompt"]) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is no file of votes, which has a prompt in each of its JSON lines ({type(error).__name__}: "
            f"{error}); give --votes another file"
        ) from error
    return Cast(len(prompts), len({*prompts}))
