"""`sweep`: many runs of one config, each with other options, to a table, a picture and the best config.

The points come of a grid, of chance, or of a search that learns (docs/sweep.md). Every run is a process of its own in a
folder of its own, several at once where asked for; a sweep that was interrupted does what is missing.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from dpo_lightning.commands.grid import Plan, read_plan
from dpo_lightning.commands.outcome import BEST, FRONTIER, OPTIONS, TABLE, Goal, report, write_best
from dpo_lightning.commands.points import Point, configured, label_of, merged, name_of
from dpo_lightning.commands.pool import Devices, Interruption, Pool, locked, pause
from dpo_lightning.commands.preflight import FitOptions, check_options, check_points, objective_of
from dpo_lightning.commands.proposals import Listed, Proposal, Proposals, Result
from dpo_lightning.commands.runs import Run
from dpo_lightning.commands.tpe import Study, import_optuna
from dpo_lightning.errors import InputError
from dpo_lightning.training.cli import RUNS, set_up_output
from dpo_lightning.training.options import read_config


def sweep(configs: Sequence[Path], grid: Path, output_dir: Path, parallel: int = 1) -> None:
    """Run every point, then write what came of them.

    Args:
        configs: of `fit`, later ones winning.
        grid: the sweep's file.
        output_dir: where runs, table, pictures and the best config go.
        parallel: runs at the same time.

    Raises:
        InputError: if an input cannot be read or any point cannot be run, before anything is written; or if any run
            failed, once the others are done and reported.
    """
    if parallel < 1:
        raise InputError(f"--parallel is how many runs go on at the same time, at least 1, got {parallel}")
    base = merged([read_config(path) for path in configs])
    plan = read_plan(grid)
    points = listed(plan)
    if plan.search.method == "tpe":
        import_optuna()
    fit, devices = FitOptions(), Devices(parallel)
    check_options(fit, configs, plan)
    known = check_points(fit, base, plan.examples() if points is None else points, plan)
    for run in known:
        devices.needed(run.options.as_dict())
    goal = Goal(*objective_of(plan.search, known, grid))

    with locked(output_dir) as (place, lock):
        if points is None:
            proposals: Proposals = Study(plan, base, goal.objective, goal.maximize, place, output_dir)
        else:
            proposals = Listed(points)

        def config_of(point: Point) -> dict[str, Any]:
            return fit.sharing(configured(base, point))

        Runner(proposals, Pool(devices, (lock,)), config_of, output_dir, plan.search.test, goal).run()
        conclude(proposals, fit, config_of, output_dir, f"{configs[0].stem} over {grid.stem}", goal, plan)


def listed(plan: Plan) -> list[Point] | None:
    """The points that are known beforehand, each once; None where they come of a search that learns."""
    if plan.search.method == "tpe":
        return None
    found = plan.points() if plan.search.method == "grid" else plan.drawn()
    points = list({name_of(point): point for point in found}.values())
    if len(points) < len(found):
        print(f"{plan.path}: {len(found) - len(points)} of {len(found)} points stand there twice and are run once")
    if plan.search.method == "random" and len(points) < plan.search.runs:
        print(f"{plan.path}: has only {len(points)} different points, so search.runs {plan.search.runs} are not made")
    return points


class Runner:
    """Takes points from where they come of, and runs them.

    Args:
        proposals: where points come of, and results go to.
        pool: the processes.
        config_of: a point's config.
        output_dir: where each point has its folder.
        test: whether `test` follows each fit.
        goal: by what runs are compared.
    """

    def __init__(
        self,
        proposals: Proposals,
        pool: Pool,
        config_of: Callable[[Point], dict[str, Any]],
        output_dir: Path,
        test: bool,
        goal: Goal,
    ) -> None:
        self.proposals, self.pool, self.goal = proposals, pool, goal
        self.config_of, self.output_dir, self.test = config_of, output_dir, test
        self.waiting: dict[Path, list[Proposal]] = {}  # folder -> what was proposed and is not yet told

    def run(self) -> None:
        """Until there is no further point, and no run goes on."""
        bar = tqdm(total=self.proposals.total, initial=len(self.proposals.results()), desc="Runs", unit="run")
        with bar, Interruption() as interruption:
            try:
                self.take_turns(bar, interruption)
            finally:
                self.pool.stop()
                for proposals in self.waiting.values():
                    for proposal in proposals:
                        self.proposals.give_back(proposal)

    def take_turns(self, bar: tqdm, interruption: Interruption) -> None:
        """Start what there is room for, and wait; a point is asked for only then, so that all before it is known."""
        following: Run | None = None
        exhausted = False
        while True:
            interruption.check()
            if following is None and not exhausted and self.pool.has_slot:
                following = self.next()
                exhausted = following is None
            if following is not None and self.pool.has_room(following):
                if following.left:
                    self.pool.start(following)
                else:
                    self.end(following, None, bar)
                following = None
                continue
            if not self.pool.going:
                return
            self.show(bar)
            for run, fault in self.pool.ended():
                self.end(run, fault, bar)
                exhausted = False  # what failed may have to be made up for
            pause()

    def next(self) -> Run | None:
        """The next run that is not yet going on."""
        while (proposal := self.proposals.ask()) is not None:
            folder = self.output_dir / name_of(proposal.point)
            self.waiting.setdefault(folder, []).append(proposal)
            if len(self.waiting[folder]) == 1:
                return Run(self.config_of(proposal.point), folder, self.test)
        return None

    def end(self, run: Run, fault: str | None, bar: tqdm) -> None:
        """Tell what came of a run to all that have proposed it."""
        figures = {} if fault else run.figures()
        for proposal in self.waiting.pop(run.folder):
            self.proposals.tell(proposal, Result(proposal.point, str(run.folder), figures, fault))
            bar.update()
        if fault:
            bar.write(f"{run.folder.name}: {fault}", file=sys.stderr)

    def show(self, bar: tqdm) -> None:
        """Which runs are going on."""
        going = [(going.run.left[0], self.waiting[going.run.folder][0].point) for going in self.pool.going]
        text = "; ".join(f"{verb} {label_of(point)}" for verb, point in going)
        if text != bar.postfix:
            bar.set_postfix_str(text)


def conclude(
    proposals: Proposals,
    fit: FitOptions,
    config_of: Callable[[Point], dict[str, Any]],
    output_dir: Path,
    title: str,
    goal: Goal,
    plan: Plan,
) -> None:
    """Table, pictures and the best config of all runs that there are.

    Raises:
        InputError: if any run failed.
    """
    results = proposals.results()
    done = [result for result in results if result.figures]
    if done:
        best = report(done, output_dir, title, goal, ranked=plan.search.method != "grid")
        if best is None:
            print(f"No run has a finite {goal.objective}, so none is the best.")
            (output_dir / BEST).unlink(missing_ok=True)
        else:
            write_best(output_dir / BEST, fit.resolved(config_of(best.point)), best, len(done), goal)
            print(f"Best (*), by the {goal}: {best.label}, in {best.folder}")
        print("Written to:")
        for name in (TABLE, OPTIONS, FRONTIER, BEST):
            if (output_dir / name).exists():
                print(f"  {output_dir / name}")
    if len(results) < proposals.total:
        print(f"{proposals.total - len(results)} runs go on elsewhere; the same command, later, has them in its table.")
    faults = [f"{Path(result.folder).name}: {result.fault}" for result in results if result.fault]
    if faults:
        raise InputError(f"{len(faults)} of {proposals.total} points failed; {'; '.join(faults)}")


class Parser(ArgumentParser):
    """Says what is wrong on one line, the last on stderr."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; --help lists all keys", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Run the verb of the command line."""
    parser = Parser(prog="python -m dpo_lightning sweep", description="Run many points: a grid, or a search.")
    parser.add_argument("--config", type=Path, action="append", required=True, help="a fit config; later ones win")
    parser.add_argument(
        "--grid", type=Path, required=True, help="YAML: option -> value, values or range (docs/sweep.md)"
    )
    parser.add_argument("--output_dir", type=Path, default=None, help="where runs, table, pictures and best.yaml go")
    parser.add_argument("--parallel", type=int, default=1, help="runs at the same time (default: 1)")
    options = parser.parse_args(sys.argv[2:])
    output_dir = options.output_dir or RUNS / f"sweep-{options.grid.stem}"
    set_up_output()
    try:
        sweep(options.config, options.grid, output_dir, options.parallel)
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. Finished runs are kept in {output_dir}: the same command does what is missing.",
            file=sys.stderr,
        )
        sys.exit(130)
