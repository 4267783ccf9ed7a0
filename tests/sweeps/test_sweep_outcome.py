"""What a sweep ends with: table, pictures and the best config."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo_lightning.commands import pictures as sweep_pictures
from dpo_lightning.commands.outcome import Goal, as_table, report, write_best
from dpo_lightning.commands.pictures import draw_frontier, draw_options
from dpo_lightning.commands.points import Point, name_of
from dpo_lightning.commands.proposals import Result
from tests.sweeps import image, table

# The table


def test_a_table_is_right_aligned_under_its_heads_and_has_floats_to_four_places() -> None:
    rows = [{"model.loss": "IPO", "seed": 3, "kl": 1 / 3}, {"model.loss": "Sigmoid", "seed": 12, "kl": 12.0}]
    assert as_table(rows).splitlines() == [
        "model.loss  seed       kl",
        "       IPO     3   0.3333",
        "   Sigmoid    12  12.0000",
    ]


# The picture


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is drawn."""
    made: list[Figure] = []

    class Recorded(Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(sweep_pictures, "Figure", Recorded)
    return made


def figures(kl: float, reward: float | None = None, accuracy: float | None = None) -> dict[str, float]:
    """What a run reports of a policy, those of the oracle only where there is one."""
    found = {"val/loss": 0.5, "test/kl": kl}
    if reward is not None:
        found |= {"test/true_reward": reward, "test/true_reward/reference": 0.4, "test/win_rate": 0.5}
    if accuracy is not None:
        found |= {"val/rewards/accuracies": accuracy}
        found |= {"val/rewards/accuracies/best": 0.9} if reward is not None else {}
    return found


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> xs and ys of what is drawn."""
    return {str(line.get_label()): tuple(map(list, line.get_data())) for line in axes.get_lines()}


POINTS: list[Point] = [
    {"model.loss": "Sigmoid", "model.loss.beta": 0.1},
    {"model.loss": "IPO", "model.loss.beta": 0.1},
    {"model.loss": "Sigmoid", "model.loss.beta": 0.3},
]


def test_the_picture_has_a_line_a_loss_of_reward_and_of_accuracy_over_kl(
    tmp_path: Path, pictures: list[Figure]
) -> None:
    found = [figures(3.0, 0.8, 0.75), figures(2.0, 0.7, 0.65), figures(1.0, 0.6, 0.55)]
    draw_frontier(POINTS, found, tmp_path / "frontier.png", "mine")
    image(tmp_path / "frontier.png")
    reward, accuracy = pictures[0].axes
    assert lines(reward) == {
        "Sigmoid": ([3.0, 1.0], [0.8, 0.6]),
        "IPO": ([2.0], [0.7]),
        "reference": ([0], [0.4]),
    }
    assert lines(accuracy) == {
        "Sigmoid": ([3.0, 1.0], [0.75, 0.55]),
        "IPO": ([2.0], [0.65]),
        "best possible": ([0, 1], [0.9, 0.9]),
    }
    assert [axes.get_ylabel() for axes in (reward, accuracy)] == ["true reward", "validation accuracy"]
    assert all("KL" in axes.get_xlabel() for axes in (reward, accuracy))
    assert [text.get_text() for text in reward.texts] == ["beta 0.1", "beta 0.3", "beta 0.1"]
    assert pictures[0].get_suptitle() == "mine"


def test_a_figure_that_no_point_has_gets_no_panel(tmp_path: Path, pictures: list[Figure]) -> None:
    points: list[Point] = [{"seed_everything": 0}, {"seed_everything": 1}]
    draw_frontier(points, [figures(1.0, accuracy=0.6), figures(2.0, accuracy=0.7)], tmp_path / "one.png", "mine")
    (axes,) = pictures[0].axes
    assert lines(axes) == {"policy": ([1.0, 2.0], [0.6, 0.7])}
    draw_frontier(points, [figures(1.0, 0.5, 0.6)] * 2, tmp_path / "two.png", "mine")
    assert image(tmp_path / "two.png").shape[1] == 2 * image(tmp_path / "one.png").shape[1]


@pytest.mark.parametrize("order", [1, -1])
def test_points_without_a_figure_are_left_out_of_its_panel_wherever_they_stand(
    tmp_path: Path, pictures: list[Figure], order: int
) -> None:
    """A grid over losses or sources has points with an oracle or an accuracy, and others without."""
    found = [figures(3.0), figures(2.0, 0.7, 0.65), figures(1.0, accuracy=0.55)][::order]
    draw_frontier(POINTS[::order], found, tmp_path / "frontier.png", "mine")
    image(tmp_path / "frontier.png")
    reward, accuracy = pictures[0].axes
    assert lines(reward) == {"IPO": ([2.0], [0.7]), "reference": ([0], [0.4])}
    assert lines(accuracy).pop("best possible", None) == ([0, 1], [0.9, 0.9])
    assert lines(accuracy)["Sigmoid"] == ([1.0], [0.55]) and lines(accuracy)["IPO"] == ([2.0], [0.65])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_point_that_diverged_does_not_take_the_others_picture(
    tmp_path: Path, pictures: list[Figure], broken: float
) -> None:
    found = [figures(broken, 0.1, 0.5), figures(2.0, broken, 0.65), figures(1.0, 0.6, 0.55)]
    draw_frontier(POINTS, found, tmp_path / "frontier.png", "mine")
    image(tmp_path / "frontier.png")
    low, high = pictures[0].axes[1].get_xlim()
    assert low < 1.0 and 2.0 < high < 3.0


def test_of_a_search_the_points_are_not_joined_and_the_best_has_a_star_in_every_panel(
    tmp_path: Path, pictures: list[Figure]
) -> None:
    found = [figures(3.0, 0.8, 0.75), {"val/loss": 0.5}, figures(1.0, 0.6, 0.55)]  # the second was not tested
    draw_frontier(POINTS, found, tmp_path / "frontier.png", "mine", POINTS[2], joined=False)
    for axes, (first, best) in zip(pictures[0].axes, ((0.8, 0.6), (0.75, 0.55)), strict=True):
        assert star(axes)[0] == (1.0, best) and dots(axes) == {(3.0, first), (1.0, best)} and not axes.texts
        assert {line.get_linestyle() for line in axes.get_lines() if line.get_marker() == "o"} == {"None"}


# The report

GOAL = Goal("val/loss", maximize=False)


def results(done: Sequence[tuple[Point, Mapping[str, float]]]) -> list[Result]:
    return [Result(point, name_of(point), found) for point, found in done]


def reported(done: Sequence[tuple[Point, Mapping[str, float]]], folder: Path, title: str, goal: Goal = GOAL) -> None:
    report(results(done), folder, title, goal)


def test_the_csv_has_a_row_a_point_with_what_was_set_and_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = [(POINTS[0], figures(1 / 3, 0.7, 0.65)), ({"data.max_length": 64}, figures(2.0, 0.5))]
    reported(done, tmp_path, "mine")
    common = {"val/loss": "0.5", "test/win_rate": "0.5"}
    assert table(tmp_path) == [
        common
        | {"model.loss": "Sigmoid", "model.loss.beta": "0.1", "data.max_length": "", "test/kl": repr(1 / 3)}
        | {"val/rewards/accuracies": "0.65", "test/true_reward": "0.7"},
        common
        | {"model.loss": "", "model.loss.beta": "", "data.max_length": "64", "test/kl": "2.0"}
        | {"val/rewards/accuracies": "", "test/true_reward": "0.5"},
    ]
    image(tmp_path / "frontier.png")
    assert "0.4000 at KL 0" in capsys.readouterr().out


def test_the_printed_table_tells_every_two_points_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = (1e-5, 3e-5, 1e-4)
    reported([({"model.optimizer.lr": rate}, figures(1.0, 0.5, 0.6)) for rate in rates], tmp_path, "mine")
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[0].split()[0] == "model.optimizer.lr"
    assert [float(line.split()[0]) for line in printed[1:4]] == list(rates)


@pytest.mark.parametrize("place", [0, 1])
def test_the_reference_is_named_once_any_point_has_an_oracle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: int
) -> None:
    done = [({"seed_everything": 0}, figures(1.0, accuracy=0.6))]
    done.insert(place, ({"data.source": "world:pairs"}, figures(1.0, 0.5, 0.6)))
    reported(done, tmp_path, "mine")
    assert "0.4000 at KL 0" in capsys.readouterr().out


def test_points_without_oracle_or_accuracy_are_reported_too(tmp_path: Path) -> None:
    """Supervised fine-tuning on a source without an oracle has neither."""
    reported([({"model.loss": "SFT"}, figures(1.5)), ({"model.loss": "SFT"}, figures(2.5))], tmp_path, "mine")
    assert table(tmp_path) == [
        {"model.loss": "SFT", "val/loss": "0.5", "test/kl": "1.5"},
        {"model.loss": "SFT", "val/loss": "0.5", "test/kl": "2.5"},
    ]


@pytest.mark.parametrize(("maximize", "expected"), [(True, 0), (False, 3)])
def test_the_best_has_the_highest_or_the_lowest_finite_figure_and_nan_never_wins(maximize: bool, expected: int) -> None:
    values = (2.0, math.nan, math.inf, -1.0, None, -math.inf, 2.0)
    found = results([({"a": n}, {} if value is None else {"val/x": value}) for n, value in enumerate(values)])
    assert Goal("val/x", maximize).best(found) == expected
    assert Goal("val/y", maximize).best(found) is None


def test_the_best_run_is_marked_and_a_ranked_table_begins_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = [({"lr": lr}, figures(1.0, accuracy=lr)) for lr in (0.25, 0.75, 0.5)] + [({"lr": 9.0}, figures(1.0))]
    for ranked, expected in ((False, [0.25, 0.75, 0.5, 9.0]), (True, [0.75, 0.5, 0.25, 9.0])):
        best = report(results(done), tmp_path, "mine", Goal("val/rewards/accuracies", True), ranked)
        assert best is not None and best.point == {"lr": 0.75}
        lines = [line.split() for line in capsys.readouterr().out.strip().splitlines()]
        assert [float(line[0]) for line in lines[1:]] == expected
        assert [line[0] for line in lines if line[-1] == "*"] == ["0.7500"]
    assert [row["lr"] for row in table(tmp_path)] == ["0.25", "0.75", "0.5", "9.0"]


def test_the_kl_of_the_pairs_stands_in_where_nothing_was_sampled_and_there_is_no_frontier(tmp_path: Path) -> None:
    reported([({"a": 1}, {"val/loss": 0.5, "val/kl_of_pairs": 2.0})], tmp_path, "mine")
    assert table(tmp_path) == [{"a": "1", "val/loss": "0.5", "val/kl_of_pairs": "2.0"}]
    assert (tmp_path / "sweep.png").exists() and not (tmp_path / "frontier.png").exists()
    reported([({"a": 1}, {"val/loss": 0.5, "val/kl_of_pairs": 2.0, "test/kl": 3.0})], tmp_path, "mine")
    assert table(tmp_path) == [{"a": "1", "val/loss": "0.5", "test/kl": "3.0"}]


def test_the_best_config_says_what_chose_it_and_is_yaml(tmp_path: Path) -> None:
    config = "model:\n  loss: Sigmoid\n"
    (best,) = results([({"model.checkpoint": "a\nb", "lr": 1e-5}, {"val/x": 0.123456789})])
    write_best(tmp_path / "best.yaml", config, best, 7, Goal("val/x", True))
    text = (tmp_path / "best.yaml").read_text()
    assert yaml.safe_load(text) == yaml.safe_load(config)
    first = text.splitlines()[0]
    for said in ("highest val/x", "7 runs", "0.123457", "lr=1e-05", best.folder):
        assert said in first


# The picture of options


def panels(figure: Figure) -> dict[tuple[str, str], Axes]:
    """(figure, option) -> panel, of a picture with labels at its left and lower edges."""
    width = len({axes.get_position().x0 for axes in figure.axes})
    rows = [figure.axes[start : start + width] for start in range(0, len(figure.axes), width)]
    return {
        (row[0].get_ylabel(), below.get_xlabel()): axes
        for row in rows
        for axes, below in zip(row, rows[-1], strict=True)
    }


def dots(axes: Axes) -> set[tuple[float, float]]:
    """Where points stand, but for the star and lines across."""
    drawn = [line for line in axes.get_lines() if line.get_marker() == "o"]
    return {(float(x), float(y)) for line in drawn for x, y in zip(*line.get_data(), strict=True)}


def star(axes: Axes) -> list[tuple[float, float]]:
    drawn = [line for line in axes.get_lines() if line.get_marker() == "*" and len(line.get_data()[0])]
    return [(float(line.get_data()[0][0]), float(line.get_data()[1][0])) for line in drawn]


def test_one_option_has_a_panel_a_figure_with_every_run_and_a_star_at_the_best(
    tmp_path: Path, pictures: list[Figure]
) -> None:
    points: list[Point] = [{"model.optimizer.lr": rate} for rate in (1e-5, 1e-3, 1e-4)]
    found = [figures(kl, reward, reward / 2) for kl, reward in ((1.0, 0.5), (3.0, 0.9), (2.0, 0.7))]
    draw_options(points, found, 1, "test/true_reward", tmp_path / "a.png", "mine")
    image(tmp_path / "a.png")
    axes = {axes.get_ylabel(): axes for axes in pictures[0].axes}
    assert list(axes) == ["true reward\n(objective)", "validation accuracy", "KL, nats an answer"]
    assert {panel.get_xlabel() for panel in axes.values()} == {"model.optimizer.lr"}
    assert {panel.get_xscale() for panel in axes.values()} == {"log"}
    assert dots(axes["KL, nats an answer"]) == {(1e-5, 1.0), (1e-4, 2.0), (1e-3, 3.0)}
    assert star(axes["validation accuracy"]) == [(1e-3, 0.45)]
    (line,) = (line for line in axes["KL, nats an answer"].get_lines() if line.get_marker() == "o")
    assert list(line.get_data()[0]) == [1e-5, 1e-4, 1e-3], "joined from left to right"


def test_several_options_have_a_column_each_and_colours_for_the_one_with_few_values(
    tmp_path: Path, pictures: list[Figure]
) -> None:
    points: list[Point] = [{"model.loss": loss, "lr": lr, "same": 1} for loss in ("IPO", "DPO") for lr in (0.1, 0.2)]
    found = [figures(1.0, accuracy=accuracy) for accuracy in (0.5, 0.6, 0.7, 0.8)]
    draw_options(points, found, 3, "val/rewards/accuracies", tmp_path / "a.png", "mine")
    shown = panels(pictures[0])
    assert {option for _, option in shown} == {"model.loss", "lr"}
    losses, rates = (shown["validation accuracy\n(objective)", option] for option in ("model.loss", "lr"))
    assert dots(losses) == {(0, 0.5), (0, 0.6), (1, 0.7), (1, 0.8)} and star(losses) == [(1, 0.8)]
    assert [label.get_text() for label in losses.get_xticklabels()] == ["IPO", "DPO"]
    assert dots(rates) == {(0.1, 0.5), (0.2, 0.6), (0.1, 0.7), (0.2, 0.8)} and rates.get_xscale() == "linear"
    joined = [line for line in rates.get_lines() if line.get_marker() == "o"]
    assert sorted(list(line.get_data()[1]) for line in joined) == [[0.5, 0.6], [0.7, 0.8]]
    assert len({line.get_color() for line in joined}) == 2
    assert {"loss IPO", "loss DPO"} <= {text.get_text() for text in rates.get_legend().get_texts()}


@pytest.mark.parametrize("broken", [math.nan, math.inf, None])
def test_a_run_without_a_finite_figure_is_not_drawn_and_spoils_nothing(
    tmp_path: Path, pictures: list[Figure], broken: float | None
) -> None:
    points: list[Point] = [{"lr": 1.0}, {"lr": 2.0}, {"other": True}]
    found = [figures(1.0, accuracy=0.5), figures(2.0, accuracy=broken), figures(3.0, accuracy=0.75)]
    draw_options(points, found, 2, "val/rewards/accuracies", tmp_path / "a.png", "mine")
    image(tmp_path / "a.png")
    axes = next(axes for axes in pictures[0].axes if "accuracy" in axes.get_ylabel())
    assert dots(axes) == {(1.0, 0.5)} and all(map(math.isfinite, axes.get_ylim()))


@pytest.mark.parametrize("points", [[{"a": 1}], [{"a": [1, 2]}, {"a": None}], [{"a": {"b": 1}}, {"a": {"b": 2}}]])
def test_any_values_and_a_single_run_make_a_picture(
    tmp_path: Path, pictures: list[Figure], points: list[Point]
) -> None:
    draw_options(points, [{"val/loss": 0.5}] * len(points), 0, "val/loss", tmp_path / "a.png", "mine")
    image(tmp_path / "a.png")
    assert len(dots(pictures[0].axes[0])) == len(points)
