"""What the page is told when it is started."""

from dataclasses import dataclass
from pathlib import Path

from dpo_lightning.data import world


@dataclass(frozen=True)
class Options:
    """Options of the page.

    Args:
        model: the folder or hub id of the model to talk to.
        reference: what it is compared with. Default: what its training started from, by its config.yaml.
        runs: the folder whose runs are offered.
        votes: the file that votes are appended to, which `fit` takes as `data.source`.
        data: the source that is looked at first, as `data.source` of a fit.
    """

    model: str = world.BASE
    reference: str | None = None
    runs: Path = Path("runs")
    votes: Path = Path("votes.jsonl")
    data: str = world.PAIRS
