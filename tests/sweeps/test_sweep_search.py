"""Searches: what a file may say of them, which points they draw, and what is found out before the first run."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import optuna
import pytest
import yaml

from dpo_lightning.commands import grid as grids
from dpo_lightning.commands import runs as processes
from dpo_lightning.commands import sweep, tpe
from dpo_lightning.commands.grid import Plan, Range, read_plan
from dpo_lightning.commands.points import Point
from dpo_lightning.commands.preflight import FitOptions, check_points
from dpo_lightning.errors import InputError
from tests.sweeps import BASE, Runs, grid, image, table

BETA = "model.loss.beta"


def plan(folder: Path, text: str) -> Plan:
    return read_plan(grid(folder, text))


# The file


def test_the_word_search_is_no_option_of_fit() -> None:
    assert not [key for key in FitOptions().keys if key.split(".")[0] == grids.SEARCH]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{low: 1, high: 8}", Range(1, 8)),
        ("{low: 0.5, high: 2}", Range(0.5, 2)),
        ("{low: 1e-6, high: 1e-4, log: true}", Range(1e-6, 1e-4, log=True)),  # which are texts in YAML
        ("{low: 4, high: 15, step: 4}", Range(4, 12, 4)),
        ("{low: -1.0, high: 1.0, step: 0.5}", Range(-1.0, 1.0, 0.5)),
    ],
)
def test_a_range_is_read_as_it_is_written(tmp_path: Path, text: str, expected: Range) -> None:
    found = plan(tmp_path, f"search: {{method: random, runs: 3}}\n{BETA}: {text}")
    assert found.blocks == [{BETA: expected}]
    assert expected.whole == all(isinstance(value, int) for value in (expected.low, expected.high))


@pytest.mark.parametrize("shape", ["search: {how}\n{options}", "- search: {how}\n- {options}"])
def test_a_search_stands_beside_the_options_or_as_an_item_of_their_list(tmp_path: Path, shape: str) -> None:
    found = plan(tmp_path, shape.format(how="{method: random, runs: 3}", options="seed_everything: [1, 2]"))
    assert found.search == grids.Search("random", 3) and found.blocks == [{"seed_everything": [1, 2]}]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: {low: 1, high: 2}", ("a is a range", "random")),
        ("search: {runs: 3}\na: [1]", ("search.runs", "grid")),
        ("search: {method: grid, seed: 3}\na: [1]", ("search.seed", "grid")),
        ("search: {method: random, runs: 3, storage: x}\na: [1]", ("search.storage", "random")),
        ("search: {method: random}\na: [1]", ("search.runs", "None")),
        ("search: {method: tpe, runs: 0}\na: [1]", ("search.runs", "0")),
        ("search: {method: tpe, runs: true}\na: [1]", ("search.runs", "expected int", "True")),
        ("search: {method: randon, runs: 3}\na: [1]", ("search.method", "randon", "tpe")),
        ("search: {direction: up}\na: [1]", ("search.direction", "maximize", "up")),
        ("search: {test: 0}\na: [1]", ("search.test", "expected bool")),
        ("search: {objectiv: val/loss}\na: [1]", ("unknown key objectiv", "objective?")),
        ("search: random\na: [1]", ("search is a mapping", "random")),
        ("search: {test: false}", ("empty",)),
        ("- {search: {test: false}, a: 1}\n- {search: {test: true}, a: 2}", ("2 of the mappings", "keep one")),
        *(
            (f"search: {{method: random, runs: 3}}\na: {{{text}}}", ("a: ", *named))
            for text, *named in (
                ("low: 1", "low and high"),
                ("low: 1, high: 2, max: 3", "max"),
                ("low: 2, high: 1", "below high"),
                ("low: x, high: 1", "numbers", "x"),
                ("low: .nan, high: 1", "numbers"),
                ("low: true, high: 2", "numbers", "True"),
                ("low: 0, high: 1, log: true", "above 0"),
                ("low: 1, high: 2, log: yes please", "true or false"),
                ("low: 1, high: 9, log: true, step: 2", "no step"),
                ("low: 1, high: 9, step: 10", "fit between"),
            )
        ),
    ],
)
def test_what_a_search_cannot_mean_is_an_error_with_its_file(tmp_path: Path, text: str, named: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        plan(tmp_path, text)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'grid.yaml'}: ") and "\n" not in message
    assert all(text in message for text in named), message


PAGE = Path(__file__).parents[2] / "docs" / "sweep.md"


@pytest.mark.parametrize("text", re.findall("```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL))
def test_every_example_of_the_page_is_a_sweep_that_can_be_run(tmp_path: Path, text: str) -> None:
    found = plan(tmp_path, text)
    points = found.points() if found.search.method == "grid" else found.examples()
    assert len(check_points(FitOptions(), BASE, points, found)) == len(points) > 1


def test_the_page_has_every_key_of_a_search() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert set(listed) == {field.name for field in fields(grids.Search)}


# Drawing


@pytest.mark.parametrize(
    ("choices", "possible"),
    [
        (Range(1, 4), {1, 2, 3, 4}),
        (Range(4, 12, 4), {4, 8, 12}),
        (Range(0.1, 0.3, 0.1), {0.1, 0.2, 0.3}),
        (Range(1, 3, log=True), {1, 2, 3}),
    ],
    ids=str,
)
def test_a_range_of_few_numbers_gives_each_of_them(choices: Range, possible: set[float]) -> None:
    random = Random(0)
    drawn = [choices.draw(random) for _ in range(300)]
    assert set(drawn) == possible and {type(value) for value in drawn} == {type(choices.low)}
    if not choices.log:
        assert min(Counter(drawn).values()) > 300 / len(possible) / 2


@pytest.mark.parametrize("log", [False, True])
def test_a_ranges_numbers_are_uniform_or_their_logarithms_are(log: bool) -> None:
    random, choices = Random(0), Range(1e-4, 1.0, log=log)
    drawn = [choices.draw(random) for _ in range(4000)]
    places = [math.log(value / 1e-4) / math.log(1e4) if log else (value - 1e-4) / (1 - 1e-4) for value in drawn]
    assert all(0 <= place <= 1 for place in places)
    shares = Counter(min(3, int(4 * place)) for place in places)
    assert all(abs(shares[quarter] / 4000 - 0.25) < 0.04 for quarter in range(4))
    assert all(float(f"{value:.4g}") == value for value in drawn), "a config is to be read"


SPACE = f"""
model.loss: [Sigmoid, IPO]
{BETA}: {{low: 0.01, high: 1.0, log: true}}
data.batch_size: {{low: 4, high: 16, step: 4}}
"""


def test_a_random_search_is_its_seed_and_more_runs_are_the_same_and_further_ones(tmp_path: Path) -> None:
    def drawn(runs: int, seed: int) -> list[Point]:
        return plan(tmp_path, f"search: {{method: random, runs: {runs}, seed: {seed}}}\n{SPACE}").drawn()

    assert drawn(20, 3) == drawn(20, 3) == drawn(30, 3)[:20] != drawn(20, 4)
    points = drawn(200, 0)
    assert {point["model.loss"] for point in points} == {"Sigmoid", "IPO"}
    assert {point["data.batch_size"] for point in points} == {4, 8, 12, 16}
    assert all(0.01 <= point[BETA] <= 1.0 for point in points)


def test_a_random_search_draws_no_point_twice_and_ends_with_the_last(
    tmp_path: Path, runs: Runs, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"search: {{method: random, runs: 9}}\n{BETA}: [0.1, 0.2]\nseed_everything: [1, 2]\n"
    assert len({str(point) for point in plan(tmp_path, text).drawn()}) == 4
    sweep.sweep([config], tmp_path / "grid.yaml", tmp_path / "out")
    assert len(runs.asked) == 8 and "only 4 different points" in capsys.readouterr().out


def test_a_search_takes_each_point_from_one_of_several_mappings(tmp_path: Path) -> None:
    text = "- search: {method: random, runs: 40}\n- {model.loss: SFT}\n"
    text += f"- {{model.loss: Sigmoid, {BETA}: {{low: 0.1, high: 1.0}}}}\n"
    points = plan(tmp_path, text).drawn()
    assert {tuple(point) for point in points} == {("model.loss",), ("model.loss", BETA)}
    assert len(points) == 40


def test_a_point_that_stands_twice_is_told_and_run_once(
    tmp_path: Path, runs: Runs, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.sweep([config], grid(tmp_path, f"{BETA}: [0.1, 0.2, 0.1]"), tmp_path / "out")
    assert [beta for verb, beta in runs.asked if verb == "fit"] == [0.1, 0.2]
    assert "1 of 3 points stand there twice" in capsys.readouterr().out


# Before the first run


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data.batchsize: [3]", ("unknown key data.batchsize", "data.batch_size?")),
        ("data.batchsize: 3\nmodel.los: IPO", ("data.batchsize", "model.loss?")),
        (f"{BETA}: [0.1, abc, -1]", ("2 of 3 points", "abc", "(beta=abc)", "must be above 0", "(beta=-1)")),
        (f"model.loss: [SFT, IPO]\n{BETA}: [0.1, 0.2]", ("2 of 4 points", "model.loss is SFT", "remove it")),
        ("model.loss: [Sigmoid, Nope]", ("1 of 2 points", "Nope", "IPO")),
        ("data.batch_size: [0, 1.5, 4]", ("2 of 3 points", "at least 1, got 0", "1.5")),
        ("trainer.log_every_n_steps: 0", ("1 of 1 points", "log_every_n_steps")),
        ("trainer.limit_test_batches: 0", ("nothing to test", "search.test")),
        ("seed_everything: [1, 2, 3, 4, 5]\ndata.bad_rows: 2", ("5 of 5 points", "(seed_everything=1,", "and 2 more)")),
        (f"search: {{method: random, runs: 4}}\n{BETA}: {{low: -1.0, high: 1.0}}", ("points cannot be run", "above 0")),
        (f"search: {{method: tpe, runs: 4}}\n{BETA}: {{low: -1.0, high: 1.0}}", ("above 0", "(beta=-1.0)")),
        (f"search: {{method: tpe, runs: 4}}\nmodel.loss: [IPO, SFT]\n{BETA}: 0.1", ("model.loss is SFT",)),
        ("search: {objective: val/rewards/accurracies}\nseed_everything: 1", ("accurracies", "val/rewards/accuracies")),
        ("search: {objective: accuracy}\nseed_everything: 1", ("accuracy",)),
        ("search: {objective: val/rewards/margins}\nmodel.loss: SFT", ("val/rewards/margins", "SFT", "val/loss")),
        ("search: {objective: test/kl, test: false}\nseed_everything: 1", ("test/kl", "test false")),
        ("search: {objective: test/true_reward}\nseed_everything: 1", ("test/true_reward",)),
        ("search: {objective: test/god}\ndata.source: world:pairs", ("test/god", "test/true_reward")),
    ],
)
def test_what_no_run_could_do_is_told_before_any_has_begun(
    tmp_path: Path, runs: Runs, config: Path, text: str, named: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as error:
        sweep.sweep([config], grid(tmp_path, text), tmp_path / "out")
    message = str(error.value)
    assert all(text in message for text in named) and "\n" not in message, message
    assert message.startswith(str(tmp_path / "grid.yaml")) and message.count(str(tmp_path / "grid.yaml")) == 1
    assert runs.asked == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "objective", "maximize"),
    [
        ("data.source: world:pairs", "test/true_reward", True),
        ("search: {test: false}\ndata.source: world:pairs", "val/rewards/accuracies", True),
        ("seed_everything: 1", "val/rewards/accuracies", True),
        ("model.loss: SFT", "val/loss", False),
        ("model.loss: [SFT, Sigmoid]", "val/rewards/accuracies", True),
        ("search: {objective: test/kl}\nseed_everything: 1", "test/kl", False),
        ("search: {objective: test/kl, direction: maximize}\nseed_everything: 1", "test/kl", True),
        ("search: {objective: test/good}\ndata.source: world:pairs", "test/good", True),
    ],
)
def test_runs_are_compared_by_the_best_figure_that_they_have_or_by_what_the_file_says(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, text: str, objective: str, maximize: bool
) -> None:
    goals: list[Any] = []
    monkeypatch.setattr(sweep, "Runner", lambda *given: goals.append(given[-1]) or Idle())
    monkeypatch.setattr(sweep, "conclude", lambda *given: None)
    sweep.sweep([config], grid(tmp_path, text), tmp_path / "out")
    assert (goals[0].objective, goals[0].maximize) == (objective, maximize)


class Idle:
    def run(self) -> None:
        pass


def test_the_best_config_is_complete_and_is_that_of_the_best_run(tmp_path: Path, runs: Runs, config: Path) -> None:
    """A fit's accuracy is 1 - beta here."""
    sweep.sweep([config], grid(tmp_path, f"search: {{test: false}}\n{BETA}: [0.5, 0.1, 0.2]"), tmp_path / "out")
    assert {verb for verb, _ in runs.asked} == {"fit"}
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert (
        best["model"]["loss"]["init_args"] | {"beta": 0.1, "label_smoothing": 0.1} == best["model"]["loss"]["init_args"]
    )
    assert best["trainer"]["max_steps"] == 2 and best["data"]["bad_rows"] == 0.01 and best["seed_everything"] == 7


def test_a_sweep_without_a_finite_objective_has_no_best_config(
    tmp_path: Path, runs: Runs, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.without = {"val/rewards/accuracies": math.nan}
    sweep.sweep([config], grid(tmp_path, f"{BETA}: [0.5, 0.1]"), tmp_path / "out")
    assert not (tmp_path / "out" / "best.yaml").exists()
    assert "No run has a finite val/rewards/accuracies" in capsys.readouterr().out
    image(tmp_path / "out" / "sweep.png")


def test_a_fit_that_was_not_tested_is_tested_once_that_is_asked_for(tmp_path: Path, runs: Runs, config: Path) -> None:
    for test, asked in ((False, ["fit"]), (True, ["test"]), (False, []), (True, [])):
        runs.asked.clear()
        points = grid(tmp_path, f"search: {{test: {str(test).lower()}}}\n{BETA}: 0.5")
        sweep.sweep([config], points, tmp_path / "out")
        assert [verb for verb, _ in runs.asked] == asked


# Optuna


def searched(folder: Path, runs: int = 8, more: str = "", space: str = f"{BETA}: {{low: 0.01, high: 1.0}}") -> Path:
    return grid(folder, f"search: {{method: tpe, test: false, runs: {runs}{more}}}\n{space}\n")


def betas(runs: Runs) -> list[float]:
    return [beta for _, beta in runs.asked]


def test_a_search_that_learns_comes_nearer_to_the_best_and_keeps_to_its_seed(
    tmp_path: Path, runs: Runs, config: Path
) -> None:
    """Accuracy is 1 - beta here: the best beta is the lowest."""
    points = searched(tmp_path, 30)
    sweep.sweep([config], points, tmp_path / "out")
    found = betas(runs)
    assert len(found) == 30 == len(set(found)) and all(0.01 <= beta <= 1 for beta in found)
    assert sum(found[10:]) / 20 < 0.3, "by chance it would be 0.5 with a standard error of 0.06"
    assert [float(row[BETA]) for row in table(tmp_path / "out")] == found
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert best["model"]["loss"]["init_args"]["beta"] == min(found)
    runs.asked.clear()
    sweep.sweep([config], points, tmp_path / "again")
    assert betas(runs) == found


def test_a_point_is_proposed_only_when_all_that_came_before_is_told(
    tmp_path: Path, runs: Runs, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    ask = optuna.Study.ask

    def counted(study: optuna.Study) -> optuna.Trial:
        told.append(sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.get_trials()))
        return ask(study)

    monkeypatch.setattr(optuna.Study, "ask", counted)
    sweep.sweep([config], searched(tmp_path, 5), tmp_path / "out")
    assert told == [0, 1, 2, 3, 4]


def test_a_finished_search_runs_nothing_and_one_with_more_runs_only_those(
    tmp_path: Path, runs: Runs, config: Path
) -> None:
    sweep.sweep([config], searched(tmp_path, 3), tmp_path / "out")
    before = betas(runs)
    sweep.sweep([config], searched(tmp_path, 3), tmp_path / "out")
    assert betas(runs) == before
    sweep.sweep([config], searched(tmp_path, 5), tmp_path / "out")
    assert len(runs.asked) == 5 and [float(row[BETA]) for row in table(tmp_path / "out")] == betas(runs)
    config.write_text(yaml.safe_dump(BASE | {"seed_everything": 1}))
    sweep.sweep([config], searched(tmp_path, 3), tmp_path / "out")
    assert len(runs.asked) == 8, "another config is another search"


@pytest.mark.parametrize(("parallel", "killed_hard"), [(1, True), (3, True), (3, False)])
def test_a_killed_run_of_a_search_is_proposed_again_and_counts_once(
    tmp_path: Path, runs: Runs, config: Path, monkeypatch: pytest.MonkeyPatch, parallel: int, killed_hard: bool
) -> None:
    points = searched(tmp_path, 6)
    runs.stop_at = 3
    if killed_hard:  # which leaves no time for this
        monkeypatch.setattr(tpe.Study, "give_back", lambda self, proposal: None)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep([config], points, tmp_path / "out", parallel)
    killed = betas(runs)[3]
    runs.stop_at = None
    sweep.sweep([config], points, tmp_path / "out", parallel)
    again = betas(runs)[4:]
    assert killed in again and len(set(betas(runs))) == 6
    assert len(table(tmp_path / "out")) == 6


def test_machines_that_share_a_storage_make_the_runs_together_and_each_has_the_whole_table(
    tmp_path: Path, runs: Runs, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second machine begins, and ends, while the first waits for its second run."""
    points = searched(tmp_path, 6, f", storage: 'sqlite:///{tmp_path}/shared.db'")
    by: dict[str, int] = {"one": 0, "two": 0}
    launch: Callable[..., Any] = runs.__call__

    def first(*given: Any) -> Any:
        by["one"] += 1
        if by["one"] == 2:
            monkeypatch.setattr(processes, "launch", second)
            sweep.sweep([config], points, tmp_path / "two")
            monkeypatch.setattr(processes, "launch", first)
        return launch(*given)

    def second(*given: Any) -> Any:
        by["two"] += 1
        return launch(*given)

    monkeypatch.setattr(processes, "launch", first)
    sweep.sweep([config], points, tmp_path / "one")
    assert by == {"one": 2, "two": 4} and len(set(betas(runs))) == 6
    assert len(table(tmp_path / "two")) == 5, "one run was going on"
    assert {row[BETA] for row in table(tmp_path / "one")} == {str(beta) for beta in betas(runs)}
    sweep.sweep([config], points, tmp_path / "two")
    assert len(runs.asked) == 6 and table(tmp_path / "one") == table(tmp_path / "two")


def test_two_machines_that_ask_at_once_do_not_make_one_run_too_many(
    tmp_path: Path, runs: Runs, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = searched(tmp_path, 3, f", storage: '{tmp_path}/journal.log'")
    ask = optuna.Study.ask

    def late(study: optuna.Study) -> optuna.Trial:
        """Another machine asks at the same moment, and is quicker."""
        if len(study.get_trials()) == 2:
            ask(study).set_user_attr("place", "elsewhere")
        return ask(study)

    monkeypatch.setattr(optuna.Study, "ask", late)
    sweep.sweep([config], points, tmp_path / "out")
    assert len(runs.asked) == 2
    monkeypatch.setattr(optuna.Study, "ask", ask)
    sweep.sweep([config], points, tmp_path / "out")
    assert len(runs.asked) == 2


def test_what_an_interrupted_machine_had_begun_is_done_by_another(tmp_path: Path, runs: Runs, config: Path) -> None:
    points = searched(tmp_path, 4, f", storage: 'sqlite:///{tmp_path}/shared.db'")
    runs.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep([config], points, tmp_path / "one")
    sweep.sweep([config], points, tmp_path / "two")
    assert betas(runs).count(betas(runs)[1]) == 2 and len(set(betas(runs))) == 4
    assert len(table(tmp_path / "two")) == 4


def test_a_point_that_is_proposed_again_while_it_runs_is_run_once_and_counts_each_time(
    tmp_path: Path, runs: Runs, config: Path
) -> None:
    runs.looks = 3
    sweep.sweep([config], searched(tmp_path, 6, space=f"{BETA}: [0.1, 0.2]"), tmp_path / "out", 3)
    assert sorted(betas(runs)) == [0.1, 0.2] and len(table(tmp_path / "out")) == 6


def test_a_run_that_fails_counts_is_told_and_is_tried_again_by_the_next_start(
    tmp_path: Path, runs: Runs, config: Path
) -> None:
    points = searched(tmp_path, 4, space=f"{BETA}: [0.5, 3]\nseed_everything: {{low: 1, high: 1000}}")
    for _ in range(2):
        with pytest.raises(InputError, match=r"of 4 points failed.*at most 1, got 3"):
            sweep.sweep([config], points, tmp_path / "out")
    good, bad = (betas(runs).count(beta) for beta in (0.5, 3))
    assert good + bad / 2 == 4 and good and bad


def test_a_run_without_a_finite_objective_is_finished_and_never_the_best(
    tmp_path: Path, runs: Runs, config: Path
) -> None:
    runs.without = {"val/rewards/accuracies": math.nan}
    for _ in range(2):
        sweep.sweep([config], searched(tmp_path, 3), tmp_path / "out")
        assert len(runs.asked) == 3 and len(table(tmp_path / "out")) == 3


def test_choices_of_any_kind_and_several_mappings_can_be_searched(tmp_path: Path, runs: Runs, config: Path) -> None:
    text = "- search: {method: tpe, test: false, runs: 12}\n- {model.loss: SFT, seed_everything: {low: 1, high: 99}}\n"
    text += f"- {{model.loss: Sigmoid, {BETA}: {{low: 0.1, high: 1.0, step: 0.1}}, data.source: [[a, b], c, null]}}\n"
    with pytest.raises(InputError, match="source"):
        sweep.sweep([config], grid(tmp_path, text), tmp_path / "out")
    sweep.sweep([config], grid(tmp_path, text.replace(", null]", "]")), tmp_path / "out")
    rows = table(tmp_path / "out")
    assert {row["data.source"] for row in rows if row[BETA]} == {"['a', 'b']", "c"}
    assert {row["model.loss"] for row in rows} == {"SFT", "Sigmoid"} and len(rows) == 12
    assert all(round(float(row[BETA]) * 10, 9).is_integer() for row in rows if row[BETA])


@pytest.mark.parametrize(
    "storage", ["nosuch://x", "sqlite:////no/such/folder/x.db", "postgresql://nobody@127.0.0.1:1/x"]
)
def test_a_storage_that_cannot_be_used_is_an_error_that_names_it(
    tmp_path: Path, runs: Runs, config: Path, storage: str
) -> None:
    with pytest.raises(InputError, match="cannot be used") as error:
        sweep.sweep([config], searched(tmp_path, 3, f", storage: '{storage}'"), tmp_path / "out")
    assert storage in str(error.value) and "\n" not in str(error.value) and runs.asked == []


def test_without_optuna_a_search_names_what_to_install_and_others_go_on(
    tmp_path: Path, runs: Runs, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install dpo_lightning\[sweep\]"):
        sweep.sweep([config], searched(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    sweep.sweep([config], grid(tmp_path, f"search: {{method: random, runs: 2}}\n{BETA}: [0.1, 0.2]"), tmp_path / "out")
    assert len(runs.asked) == 4
