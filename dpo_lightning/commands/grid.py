"""What a sweep's YAML asks for: a grid of points, or a space to search and how.

The file is a mapping of option -> value, list of values, or range; or a list of such mappings. The word `search`, which
is no option of `fit`, stands beside the options and says how they are searched; without it the file is a grid.
"""

import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from dpo_lightning.commands.points import Point, name_of
from dpo_lightning.errors import InputError
from dpo_lightning.training.options import NoDuplicates

#: How a space can be searched.
METHODS = ("grid", "random", "tpe")

#: Digits of a number that a search draws: a config is to be read, and no figure depends on a fifth digit.
DIGITS = 4

SEARCH = "search"


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; integers where both are written as integers.

    Attributes:
        step: only `low`, `low + step`, ...
        log: whether each power of ten is as likely as any other.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether these are integers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))

    def draw(self, random: Random) -> float:
        """A number of the range, each as likely as any other, or each of its logarithms."""
        if self.step is not None:
            return self.rounded(self.low + self.step * random.randrange(self.steps + 1))
        if self.log:
            return self.rounded(math.exp(random.uniform(math.log(self.low), math.log(self.high))))
        return random.randint(self.low, self.high) if self.whole else self.rounded(random.uniform(self.low, self.high))

    @property
    def steps(self) -> int:
        """How many steps fit in."""
        return math.floor((self.high - self.low) / self.step + 1e-9)

    def rounded(self, value: float) -> float:
        """A number as it is written into a config."""
        value = round(value) if self.whole else float(f"{value:.{DIGITS}g}")
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Search:
    """How a space is searched, and by what its runs are compared.

    Attributes:
        method: grid runs every combination; random draws points; tpe (Optuna) draws them where earlier ones were good.
        runs: how many points are drawn.
        seed: of the drawing.
        objective: tag by which runs are compared. Default: test/true_reward where there is an oracle, else
            val/rewards/accuracies, else val/loss.
        direction: maximize or minimize the objective. Default: what is good for that tag.
        storage: where tpe keeps what was tried: a URL of Optuna's, or a path for a journal file; machines that share
            it share the sweep. Default: a file in the output directory.
        test: whether `test` follows each fit, which samples answers.
    """

    method: str = "grid"
    runs: int | None = None
    seed: int = 0
    objective: str | None = None
    direction: str | None = None
    storage: str | None = None
    test: bool = True


@dataclass(frozen=True)
class Plan:
    """A sweep's file, read.

    Attributes:
        path: of the file.
        blocks: option -> its values or its range; a point takes its options from one of them.
        search: how points are taken.
    """

    path: Path
    blocks: list[dict[str, list[Any] | Range]]
    search: Search

    def points(self) -> list[Point]:
        """Every combination, in the file's order; of a range the two ends."""
        found: list[Point] = []
        for block in self.blocks:
            choices = [[v.low, v.high] if isinstance(v, Range) else v for v in block.values()]
            found += [dict(zip(block, values, strict=True)) for values in itertools.product(*choices)]
        return found

    def drawn(self) -> list[Point]:
        """The points of a random search, none twice; fewer than were asked for if there are no more.

        More runs with the same seed are the same points and further ones.
        """
        random = Random(self.search.seed)
        found: dict[str, Point] = {}
        missed = 0
        while len(found) < self.search.runs and missed < 1000:
            block = random.choice(self.blocks)
            point = {k: v.draw(random) if isinstance(v, Range) else random.choice(v) for k, v in block.items()}
            missed = missed + 1 if name_of(point) in found else 0
            found.setdefault(name_of(point), point)
        return list(found.values())

    def examples(self) -> list[Point]:
        """Points in which each value, and each end of a range, stands at least once: what can be checked of a space."""
        found: dict[str, Point] = {}
        for block in self.blocks:
            choices = {k: [v.low, v.high] if isinstance(v, Range) else v for k, v in block.items()}
            first = {key: values[0] for key, values in choices.items()}
            for key, values in choices.items():
                for value in values:
                    found.setdefault(name_of(first | {key: value}), first | {key: value})
        return list(found.values())


def read_grid(path: Path) -> list[Point]:
    """The points of a grid file, in its order.

    Raises:
        InputError: if it cannot be read as such, or has no point.
    """
    return read_plan(path).points()


def read_plan(path: Path) -> Plan:
    """Read a sweep's file.

    Raises:
        InputError: if it cannot be read as such, or has no point.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such grid file; --grid takes a YAML file")
    try:
        blocks = yaml.load(path.read_text(encoding="utf-8"), NoDuplicates)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not YAML: {' '.join(str(error).split())}; mend it") from error
    blocks = blocks if isinstance(blocks, list) else [blocks]
    if not all(isinstance(block, Mapping) and block and all(isinstance(k, str) for k in block) for block in blocks):
        raise InputError(f"{path}: expected option: [values ...], or a list of such mappings, got {blocks!r:.80}")
    given = [block[SEARCH] for block in blocks if SEARCH in block]
    if len(given) > 1:
        raise InputError(f"{path}: {SEARCH} stands in {len(given)} of the mappings, but one sweep has one; keep one")
    options = [{key: value for key, value in block.items() if key != SEARCH} for block in blocks]
    read = [{key: choices_of(path, key, value) for key, value in block.items()} for block in options if block]
    if not read:
        raise InputError(f"{path}: is empty, so there is no point to run; expected option: [values ...]")
    search = read_search(path, given[0]) if given else Search()
    ranges = [key for block in read for key, value in block.items() if isinstance(value, Range)]
    if ranges and search.method == "grid":
        raise InputError(
            f"{path}: {ranges[0]} is a range, of which a grid would have endless points; list its values, or set "
            f"{SEARCH}: {{method: random, runs: 20}}"
        )
    return Plan(path, read, search)


def choices_of(path: Path, key: str, value: Any) -> list[Any] | Range:
    """What an option may be: the values of a list, those of a range, or the one that stands there.

    Raises:
        InputError: for an empty list, or a range that is none.
    """
    if isinstance(value, Mapping) and {"low", "high"} & value.keys():
        return range_of(f"{path}: {key}", value)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InputError(f"{path}: a list of values is empty, so there is no point to run; remove it or fill it")
    return values


def range_of(where: str, given: Mapping[str, Any]) -> Range:
    """A range as it is written.

    Raises:
        InputError: if it is none.
    """
    names = {field.name for field in fields(Range)}
    if not {"low", "high"} <= given.keys() <= names:
        raise InputError(f"{where}: a range has low and high, and may have step or log, got {dict(given)}")
    low, high = number(where, given["low"]), number(where, given["high"])
    step = None if given.get("step") is None else number(where, given["step"])
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise InputError(f"{where}: log is true or false, got {log!r}")
    if low >= high:
        raise InputError(f"{where}: low must be below high, got low {low} and high {high}")
    if log and (low <= 0 or step is not None):
        raise InputError(f"{where}: with log, low must be above 0 and there is no step, got {dict(given)}")
    if step is not None and not 0 < step <= high - low:
        raise InputError(f"{where}: step must be above 0 and fit between low and high, got {step}")
    found = Range(low, high, step, log)
    return found if step is None else replace(found, high=low + step * found.steps)


def number(where: str, value: Any) -> float:
    """A number of YAML, in which 1e-6 is a text.

    Raises:
        InputError: if it is none.
    """
    try:
        found = value if isinstance(value, int) and not isinstance(value, bool) else float(str(value))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{where}: low, high and step are numbers, got {value!r}")
    return found


def read_search(path: Path, given: Any) -> Search:
    """How a space is to be searched.

    Raises:
        InputError: for an unknown key, a value that cannot be, or one that the method would ignore.
    """
    where = f"{path}: {SEARCH}"
    names = [field.name for field in fields(Search)]
    if not isinstance(given, Mapping):
        raise InputError(f"{where} is a mapping such as {{method: random, runs: 20}}, got {given!r:.80}")
    for key in given:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, 1)
            cure = f"did you mean {close[0]}?" if close else f"its keys are {', '.join(names)}"
            raise InputError(f"{where}: unknown key {key}; {cure}")
    search = Search(**given)
    kinds = {"seed": int, "test": bool, "objective": str, "storage": str, "runs": int}
    for key, value in asdict(search).items():
        if value is not None and key in kinds and type(value) is not kinds[key]:
            raise InputError(f"{where}.{key}: expected {kinds[key].__name__}, got {value!r}")
    for key, allowed in (("method", METHODS), ("direction", (None, "maximize", "minimize"))):
        if asdict(search)[key] not in allowed:
            raise InputError(f"{where}.{key} is one of {', '.join(filter(None, allowed))}, got {asdict(search)[key]!r}")
    if search.method != "grid" and (search.runs is None or search.runs < 1):
        raise InputError(f"{where}.runs says how many points are drawn, at least 1, got {search.runs}; set it")
    ignored = {"grid": {"runs", "seed", "storage"}, "random": {"storage"}, "tpe": set()}[search.method]
    if useless := sorted(ignored & given.keys()):
        raise InputError(f"{where}.{useless[0]} says nothing to the method {search.method}; remove it, or the method")
    return search
