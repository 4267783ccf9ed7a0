"""A search that learns from its runs, by Optuna: a tree-structured Parzen estimator (Bergstra et al. 2011).

What was tried and what came of it stands in Optuna's storage. Machines that share one ask it for points and tell it
what came of them; together they make as many runs as the sweep has. A trial is counted if it is waiting, going on or
done; one that was killed is proposed again, as a trial that `repeats` it.
"""

import json
import math
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from dpo_lightning.commands.grid import Plan, Range
from dpo_lightning.commands.points import Point, digest_of
from dpo_lightning.commands.proposals import Proposal, Proposals, Result
from dpo_lightning.errors import InputError

#: Points that are drawn without looking at others: so many, or a third of the runs if those are fewer.
BLIND = 10

#: A trial without a place was killed while it was made, if it is so old.
MAKING = timedelta(minutes=1)


def import_optuna() -> ModuleType:
    """Optuna, which only this needs.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            "search.method tpe needs Optuna, which is not installed; pip install dpo_lightning[sweep], or set method "
            "random"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


class Study(Proposals):
    """Points that Optuna proposes.

    Args:
        plan: the space, and how it is searched.
        config: what the points are set in; the same space in another config is another study.
        objective: tag that is to be as high as can be, or as low.
        maximize: which of the two.
        place: a name for this sweep's folder; trials that it began and did not finish were killed.
        folder: where the default storage stands.

    Raises:
        InputError: if the storage cannot be used.
    """

    def __init__(
        self, plan: Plan, config: dict[str, Any], objective: str, maximize: bool, place: str, folder: Path
    ) -> None:
        self.optuna = import_optuna()
        self.plan, self.objective, self.place = plan, objective, place
        self.total = plan.search.runs
        self.state = self.optuna.trial.TrialState
        self.asked: dict[int, Any] = {}  # number -> trial, of those that go on here
        same = [config, [{key: repr(value) for key, value in block.items()} for block in plan.blocks]]
        name = f"{plan.path.stem}-{digest_of([*same, objective, maximize, plan.search.test])}"
        storage = plan.search.storage or f"sqlite:///{(folder / 'study.db').resolve()}"
        try:
            self.study = self.optuna.create_study(
                storage=storage if "://" in storage else self.journal(Path(storage)),
                study_name=name,
                direction="maximize" if maximize else "minimize",
                load_if_exists=True,
            )
        except Exception as error:  # of whatever database driver
            raise InputError(
                f"{plan.path}: search.storage {storage} cannot be used: {' '.join(str(error).split())[:300]}; give a "
                "URL of a database that exists, such as sqlite:///sweep.db, or a path for a journal file"
            ) from error
        for trial in self.counted():
            if self.is_lost(trial) or ("fault" in trial.user_attrs and self.is_mine(trial)):
                self.repeat(trial)

    def journal(self, path: Path) -> Any:
        """A storage in a file that machines can share over a network's file system."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return self.optuna.storages.JournalStorage(self.optuna.storages.journal.JournalFileBackend(str(path)))

    # Trials

    def counted(self) -> list[Any]:
        """The trials that are among the sweep's runs, the oldest first."""
        trials = self.study.get_trials(deepcopy=False)
        repeated = {trial.user_attrs["repeats"] for trial in trials if "repeats" in trial.user_attrs}
        killed = (trial.state == self.state.FAIL and "figures" not in trial.user_attrs for trial in trials)
        return [t for t, dead in zip(trials, killed, strict=True) if not dead and t.number not in repeated]

    def is_mine(self, trial: Any) -> bool:
        return trial.user_attrs.get("place") == self.place

    def is_lost(self, trial: Any) -> bool:
        """Whether a trial goes on according to the storage, but no longer in truth."""
        if trial.state != self.state.RUNNING:
            return False
        unplaced = "place" not in trial.user_attrs
        return self.is_mine(trial) or (unplaced and datetime.now() - trial.datetime_start > MAKING)

    def repeat(self, trial: Any) -> None:
        """Propose a trial's point again, to whoever asks next, and no longer count the trial itself."""
        self.study.enqueue_trial(trial.params, user_attrs={"repeats": trial.number})
        if trial.state == self.state.RUNNING:
            self.study.tell(trial.number, state=self.state.FAIL)

    # Proposals

    def ask(self) -> Proposal | None:
        counted = self.counted()
        if len(counted) >= self.total and not any(trial.state == self.state.WAITING for trial in counted):
            return None
        trial = self.study.ask()
        if trial.number in {t.number for t in self.counted()[self.total :]}:  # another machine was quicker
            self.study.tell(trial, state=self.state.FAIL)
            return None
        trial.set_user_attr("place", self.place)
        # A sampler of each trial's own: two machines with one seed would otherwise draw the same points, and so would
        # a sweep that was started again.
        seed = int(digest_of([self.plan.search.seed, trial.number]), 16)
        blind = min(BLIND, -(-self.total // 3))
        self.study.sampler = self.optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=blind, multivariate=False, constant_liar=True
        )
        point = self.suggested(trial)
        trial.set_user_attr("point", point)
        self.asked[trial.number] = trial
        return Proposal(trial.number, point)

    def suggested(self, trial: Any) -> Point:
        """A trial's point: of several mappings one, and a value for each of its options."""
        blocks = self.plan.blocks
        number = trial.suggest_categorical("mapping", list(range(len(blocks)))) if len(blocks) > 1 else 0
        prefix = f"{number}: " if len(blocks) > 1 else ""
        return {key: self.value(trial, f"{prefix}{key}", choices) for key, choices in blocks[number].items()}

    def value(self, trial: Any, name: str, choices: list[Any] | Range) -> Any:
        """A trial's value for an option."""
        if isinstance(choices, Range):
            if choices.whole:
                return trial.suggest_int(name, choices.low, choices.high, step=choices.step or 1, log=choices.log)
            low, high = float(choices.low), float(choices.high)
            return choices.rounded(trial.suggest_float(name, low, high, step=choices.step, log=choices.log))
        if len(choices) == 1:
            return choices[0]
        texts = {json.dumps(choice, default=str): choice for choice in choices}  # a storage keeps plain values only
        return texts[trial.suggest_categorical(name, list(texts))]

    def tell(self, proposal: Proposal, result: Result) -> None:
        trial = self.asked.pop(proposal.number)
        for name, value in (("figures", dict(result.figures)), ("folder", result.folder), ("fault", result.fault)):
            if value is not None:
                trial.set_user_attr(name, value)
        value = result.figures.get(self.objective, math.nan)
        if math.isfinite(value):
            self.study.tell(trial, value)
        else:  # nothing to learn from
            self.study.tell(trial, state=self.state.FAIL)

    def give_back(self, proposal: Proposal) -> None:
        self.repeat(self.study.get_trials(deepcopy=False)[proposal.number])
        del self.asked[proposal.number]

    def results(self) -> list[Result]:
        done = [trial for trial in self.counted() if trial.state in (self.state.COMPLETE, self.state.FAIL)]
        told = [trial.user_attrs for trial in done]
        return [Result(own["point"], own["folder"], own["figures"], own.get("fault")) for own in told]
