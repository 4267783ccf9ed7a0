"""Which point is run next, and what came of those before: a list of points, as a grid or a random search has it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpo_lightning.commands.points import Point, label_of


@dataclass(frozen=True)
class Proposal:
    """A point to be run; `number` tells it from others that may be equal."""

    number: int
    point: Point


@dataclass(frozen=True)
class Result:
    """What came of a point.

    Attributes:
        point: what was set.
        folder: of the run.
        figures: its last validation and test figures.
        fault: why there are none, if there are none.
    """

    point: Point
    folder: str
    figures: Mapping[str, float]
    fault: str | None = None

    @property
    def label(self) -> str:
        """What was set, shortly."""
        return label_of(self.point)


class Proposals(ABC):
    """Points to be run, one after the other.

    Attributes:
        total: how many runs the sweep has.
    """

    total: int

    @abstractmethod
    def ask(self) -> Proposal | None:
        """The next point; None if there is none, unless a run that is going on fails."""

    @abstractmethod
    def tell(self, proposal: Proposal, result: Result) -> None:
        """Say what came of a point."""

    @abstractmethod
    def give_back(self, proposal: Proposal) -> None:
        """Say that a point was begun and not finished."""

    @abstractmethod
    def results(self) -> list[Result]:
        """What came of the points so far, in the order in which they were proposed."""


class Listed(Proposals):
    """Points that are known before the first is run."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = points
        self.total = len(points)
        self.asked = 0
        self.told: dict[int, Result] = {}

    def ask(self) -> Proposal | None:
        if self.asked == self.total:
            return None
        self.asked += 1
        return Proposal(self.asked - 1, self.points[self.asked - 1])

    def tell(self, proposal: Proposal, result: Result) -> None:
        self.told[proposal.number] = result

    def give_back(self, proposal: Proposal) -> None:
        """Nothing to do: a sweep that is started again begins with the first point."""

    def results(self) -> list[Result]:
        return [self.told[number] for number in sorted(self.told)]
