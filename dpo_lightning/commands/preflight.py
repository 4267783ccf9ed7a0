"""What can be known of a sweep's runs before any of them has begun: whether `fit` takes their configs at all.

Every config goes through the parser of `fit` and the checks that its classes make of their arguments, in this process
and in a tenth of a second. No file is read and no weight loaded, so a missing source is found by its run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from dpo_lightning.commands.grid import SEARCH, Plan, Search
from dpo_lightning.commands.points import Point, configured, label_of, merged
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.oracle import Judgement
from dpo_lightning.errors import InputError
from dpo_lightning.objective.metrics import figures_of
from dpo_lightning.objective.preference import PreferenceLoss
from dpo_lightning.training.cli import CLASS_OPTIONS, DPOCLI, RECORDS, Parser, check_trainer
from dpo_lightning.training.options import check_classes, check_keys, flatten, given_options

#: What tells runs apart where nothing is said, best first.
OBJECTIVES = ("test/true_reward", "val/rewards/accuracies", "val/loss")

#: Last words of tags of which less is better.
LESS_IS_BETTER = frozenset({"loss", "kl", "kl_of_pairs", "displacement", "saturation", "low", "high"})

#: What `test` reports of any policy, and where there is an oracle.
SAMPLED = ("kl", "kl/low", "kl/high", *(f"{k}/{who}" for k in ("tokens", "ended") for who in ("policy", "reference")))
JUDGED = ("true_reward", "true_reward/reference", "win_rate", "win_rate/low", "win_rate/high")

#: Points that a fault's sentence names.
NAMED = 3


class FitParser(Parser):
    """The parser of `fit`, which says what is wrong to its caller."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(" ".join(message.split()))


@dataclass(frozen=True)
class Known:
    """What a config says of its run.

    Attributes:
        options: all of them, with their defaults.
        loss: what is trained.
        data: what it is trained on.
    """

    options: Namespace
    loss: PreferenceLoss
    data: PreferenceDataModule

    def reports(self, tag: str, tested: bool) -> bool:
        """Whether the run can have a figure of that name."""
        stage, _, name = tag.partition("/")
        if stage == "val":
            return name in figures_of(self.loss) and self.options.trainer.limit_val_batches != 0
        if stage != "test" or not tested:
            return False
        if name in SAMPLED:
            return True
        own = {"good", *(field.name for field in fields(Judgement))}  # of the built-in world's
        return self.data.oracle is not None and (
            name in JUDGED or self.data.oracle_name is not None or name.removesuffix("/reference") in own
        )


class FitOptions(DPOCLI):
    """The options of `fit` for many configs, none of which is run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": DPOCLI.subcommands()["fit"]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        self.parser_class = FitParser
        return super().init_parser(**kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Nothing yet: configs come later."""
        self.config = Namespace(subcommand="fit")

    def _set_seed(self) -> None:
        """Nothing random happens here."""

    def before_instantiate_classes(self) -> None:
        """Nothing to do without a config."""

    def instantiate_classes(self) -> None:
        """Nothing to do without a config."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing to do without a config."""

    @property
    def keys(self) -> set[str]:
        """Every option."""
        return {action.dest for action in self._parser("fit")._actions}

    def know(self, config: Mapping[str, Any], where: str) -> Known:
        """Parse a config and make of it what costs nothing.

        Args:
            config: nested options.
            where: the file that a message names.

        Raises:
            InputError: if `fit` would refuse it.
        """
        check_classes(flatten(config, where), CLASS_OPTIONS | RECORDS)
        options = self._parser("fit").parse_object(dict(config))
        if options.push_to_hub is not None:
            raise InputError(
                f"{where}: push_to_hub is given, but a sweep's runs would all go to one repository; leave it out, and "
                "push the best one with `export`"
            )
        made = self._parser("fit").instantiate(options)
        check_trainer(options.trainer)
        return Known(options, made.model.loss, made.data)

    def sharing(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config whose run shares the reference's log-probabilities with all others, unless it names a reference.

        A loss that needs none has none, and a stream cannot know them before.
        """
        known = self.know(config, "the config")
        shares = known.loss.needs_reference and not known.data.streaming and known.options.model.reference is None
        return merged([config, {"model": {"reference": "CachedLogps"}}] if shares else [config])

    def resolved(self, config: Mapping[str, Any]) -> str:
        """A config with every option that it leaves to a default, as YAML that `fit` takes."""
        parser = self._parser("fit")
        return parser.dump(parser.parse_object(dict(config)), skip_unset=False)


def check_options(fit: FitOptions, configs: Sequence[Path], plan: Plan) -> None:
    """Raises InputError for any key, of configs or of the sweep's file, that is no option of `fit`; all are named."""
    given = given_options([word for path in configs for word in ("--config", str(path))])
    check_keys(given, fit.keys)
    faults: dict[str, None] = {}
    for option in (option for block in plan.blocks for option in flatten(dict.fromkeys(block), str(plan.path))):
        try:
            check_keys([option], fit.keys)
        except InputError as error:
            faults[str(error).removeprefix(f"{plan.path}: ")] = None
    if faults:
        raise InputError(f"{plan.path}: {'; '.join(faults)}")


def check_points(fit: FitOptions, base: Mapping[str, Any], points: Sequence[Point], plan: Plan) -> list[Known]:
    """What is known of each point's run.

    Raises:
        InputError: if `fit` would refuse any; every fault is told, once.
    """
    found: list[Known] = []
    faults: dict[str, list[Point]] = {}
    for point in points:
        try:
            known = fit.know(configured(base, point), str(plan.path))
            if plan.search.test and known.options.trainer.limit_test_batches == 0:
                raise InputError(
                    f"trainer.limit_test_batches is 0, so there is nothing to test; set {SEARCH}.test false"
                )
            found.append(known)
        except InputError as error:
            faults.setdefault(str(error).removeprefix(f"{plan.path}: "), []).append(point)
    if faults:
        count = sum(map(len, faults.values()))
        raise InputError(
            f"{plan.path}: {count} of {len(points)} points cannot be run: {'; '.join(map(said, faults.items()))}"
        )
    return found


def said(fault: tuple[str, list[Point]]) -> str:
    """A fault with the points that have it."""
    message, points = fault
    names = [label_of(point) for point in points[:NAMED]]
    return f"{message} ({' and '.join(names)}{f' and {len(points) - NAMED} more' if len(points) > NAMED else ''})"


def objective_of(search: Search, known: Sequence[Known], path: Path) -> tuple[str, bool]:
    """By what the runs are compared, and whether more of it is better.

    Raises:
        InputError: if no run can have what the file names.
    """

    def possible(tag: str) -> bool:
        return any(run.reports(tag, search.test) for run in known)

    tag = search.objective or next(filter(possible, OBJECTIVES), OBJECTIVES[-1])
    if search.objective is not None and not possible(tag):
        losses = sorted({type(run.loss).__name__ for run in known})
        raise InputError(
            f"{path}: {SEARCH}.objective is {tag}, which no run of this sweep reports (loss {', '.join(losses)}, "
            f"test {str(search.test).lower()}); one of {', '.join(filter(possible, OBJECTIVES))} is"
        )
    if search.direction is not None:
        return tag, search.direction == "maximize"
    return tag, tag.rpartition("/")[2] not in LESS_IS_BETTER
