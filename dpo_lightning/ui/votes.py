"""Votes as rows of a file that `fit` takes as its source."""

import fcntl
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dpo_lightning.errors import InputError
from dpo_lightning.ui.voice import Sampling

Verdict = Literal["first", "second", "tie"]


@dataclass(frozen=True)
class Answered:
    """A prompt as the models read it, and an answer of each of two models."""

    prompt: str
    answers: tuple[str, str]
    models: tuple[str, str]


def record(file: Path, answered: Answered, verdict: Verdict, sampling: Sampling, system: Mapping[str, Any]) -> Path:
    """Append a vote; returns the file.

    A tie prefers nothing, so it goes into a file beside, `votes.ties.jsonl` for `votes.jsonl`.

    Args:
        file: JSON lines with `prompt, chosen, rejected`, the time, both models and how the answers were drawn.
        answered: what was voted on.
        verdict: which answer is better.
        sampling: how the answers were drawn.
        system: more columns.

    Raises:
        InputError: if the file cannot be written.
    """
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "sampling": asdict(sampling), **system}
    if verdict == "tie":
        file = file.with_suffix(f".ties{file.suffix}")
        row = {"prompt": answered.prompt, "answers": answered.answers, "models": answered.models, **about}
    else:
        better = 0 if verdict == "first" else 1
        row = {
            "prompt": answered.prompt,
            "chosen": answered.answers[better],
            "rejected": answered.answers[1 - better],
            "chosen_model": answered.models[better],
            "rejected_model": answered.models[1 - better],
            **about,
        }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            fcntl.flock(lines, fcntl.LOCK_EX)  # two tabs may vote at once
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{file}: the vote cannot be written ({error}); give --votes another file") from error
    return file


def count(file: Path) -> int:
    """Votes in a file."""
    if not file.exists():
        return 0
    with file.open(encoding="utf-8") as lines:
        return sum(1 for _ in lines)
