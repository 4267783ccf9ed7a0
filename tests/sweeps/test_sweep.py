"""`sweep` without its runs: grids, a point's config and folder, and what is run again."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.commands import sweep
from dpo_lightning.commands.grid import read_grid
from dpo_lightning.commands.points import Point, configured, merged, name_of
from dpo_lightning.errors import InputError
from tests.sweeps import BASE, Runs, grid, image, table

Tree = dict[str, Any]


# The grid


def test_a_mapping_stands_for_every_combination_the_last_option_changing_first(tmp_path: Path) -> None:
    text = "model.loss: [Sigmoid, IPO]\nmodel.loss.beta: [0.3, 0.1]\nseed_everything: [2, 1, 3]\n"
    expected = []
    for loss in ("Sigmoid", "IPO"):
        for beta in (0.3, 0.1):
            for seed in (2, 1, 3):
                expected.append({"model.loss": loss, "model.loss.beta": beta, "seed_everything": seed})
    found = read_grid(grid(tmp_path, text))
    assert found == expected
    assert all(list(point) == list(expected[0]) for point in found)


def test_a_list_of_mappings_is_one_after_the_other(tmp_path: Path) -> None:
    text = "- {b: [2, 1], a: x}\n- {a: [y, z]}\n- {c: [0.5]}\n"
    expected = [{"b": 2, "a": "x"}, {"b": 1, "a": "x"}, {"a": "y"}, {"a": "z"}, {"c": 0.5}]
    assert read_grid(grid(tmp_path, text)) == expected


@pytest.mark.parametrize("value", ["Sigmoid", 3, 0.5, True, None, "a, b", {"class_path": "SFT"}])
def test_a_value_that_is_no_list_is_as_good_as_a_list_of_one(tmp_path: Path, value: object) -> None:
    alone, listed = (
        grid(tmp_path, yaml.safe_dump({"x": given, "y": [1, 2]}), name)
        for name, given in (("alone.yaml", value), ("listed.yaml", [value]))
    )
    assert read_grid(alone) == read_grid(listed) == [{"x": value, "y": 1}, {"x": value, "y": 2}]


def test_a_list_inside_a_list_is_one_value(tmp_path: Path) -> None:
    assert read_grid(grid(tmp_path, "data.source: [[a.jsonl, b.jsonl], [c.jsonl]]\n")) == [
        {"data.source": ["a.jsonl", "b.jsonl"]},
        {"data.source": ["c.jsonl"]},
    ]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model.loss.beta: [0.1", "is not YAML"),
        ("", "expected option"),
        ("0.1", "expected option"),
        ("just words", "expected option"),
        ("[0.1, 0.3]", "expected option"),
        ("{}", "expected option"),
        ("- {a: 1}\n- {}\n", "expected option"),
        ("- {a: 1}\n- b\n", "expected option"),
        ("[]", "empty"),
        ("a: []", "empty"),
        ("a: [1, 2]\nb: []\n", "empty"),
        ("- {a: [1, 2]}\n- {b: []}\n", "empty"),
        ("a: [1, 2]\na: [3]\n", "twice"),
        ("3: [1, 2]", "3"),
    ],
)
def test_a_grid_that_would_lose_a_point_or_has_none_is_an_error_with_its_file(
    tmp_path: Path, text: str, named: str
) -> None:
    path = grid(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_grid(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and named in message and "\n" not in message


def test_a_grid_file_that_is_not_there_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="--grid") as error:
            read_grid(path)
        assert str(error.value).startswith(f"{path}: no such grid file")


# Configs put together


def leaves(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Path -> what stands there, of everything that is no mapping."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        found |= leaves(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value}
    return found


KEYS = st.sampled_from("abc")
TREES = st.recursive(
    st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=2),
    lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3),
    max_leaves=8,
)
CONFIGS = st.dictionaries(KEYS, TREES, max_size=3)


@settings(deadline=None, max_examples=100)
@given(first=CONFIGS, second=CONFIGS)
def test_of_two_configs_the_later_wins_where_both_speak_and_nowhere_else(first: Tree, second: Tree) -> None:
    mine, later = leaves(first), leaves(second)

    def overruled(path: tuple[str, ...]) -> bool:
        """Whether the later config has a value at the path, above it or below it."""
        return any(path[: len(other)] == other[: len(path)] for other in later)

    assert leaves(merged([first, second])) == {k: v for k, v in mine.items() if not overruled(k)} | later


def test_one_config_and_none_are_themselves() -> None:
    config = {"model": {"loss": {"class_path": "IPO"}}, "seed_everything": 3}
    assert merged([]) == {} and merged([config]) == config == merged([{}, config, {}])


def test_what_is_done_to_a_merged_config_leaves_its_parts_alone() -> None:
    parts = [{"a": {"b": [1]}}, {"a": {"c": {"d": [2]}}, "e": [3]}]
    before = copy.deepcopy(parts)
    result = merged(parts)
    result["a"]["b"].append(0)
    result["a"]["c"]["d"].append(0)
    result["e"].append(0)
    assert parts == before


# A point in its config


def changed(change: Callable[[Tree], object]) -> Tree:
    config = copy.deepcopy(BASE)
    change(config)
    return config


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ({}, BASE),
        ({"seed_everything": 1}, changed(lambda c: c.update(seed_everything=1))),
        ({"data.max_length": 64}, changed(lambda c: c["data"].update(max_length=64))),
        ({"data.source": ["a", "b"]}, changed(lambda c: c["data"].update(source=["a", "b"]))),
        ({"model.loss": "SFT"}, changed(lambda c: c["model"].update(loss={"class_path": "SFT"}))),
        ({"model.loss": "Sigmoid"}, changed(lambda c: c["model"].update(loss={"class_path": "Sigmoid"}))),
        (
            {"model.loss.beta": 0.9, "model.loss": "IPO"},  # in whatever order
            changed(lambda c: c["model"].update(loss={"class_path": "IPO", "init_args": {"beta": 0.9}})),
        ),
        ({"model.loss.beta": 0.9}, changed(lambda c: c["model"]["loss"]["init_args"].update(beta=0.9))),
        ({"model.optimizer.lr": 0.1}, changed(lambda c: c["model"]["optimizer"]["init_args"].update(lr=0.1))),
        (
            {"model.optimizer": "SGD", "model.optimizer.lr": 0.1},
            changed(lambda c: c["model"].update(optimizer={"class_path": "SGD", "init_args": {"lr": 0.1}})),
        ),
        (
            {"model.loss": {"class_path": "IPO", "init_args": {"beta": 0.2}}},
            changed(lambda c: c["model"].update(loss={"class_path": "IPO", "init_args": {"beta": 0.2}})),
        ),
        ({"model.reference": None}, changed(lambda c: c["model"].update(reference=None))),
    ],
    ids=str,
)
def test_a_point_sets_its_options_a_class_with_all_its_fields_and_nothing_else(point: Point, expected: Tree) -> None:
    assert configured(BASE, point) == expected


def test_a_group_written_as_a_mapping_leaves_alone_what_it_does_not_name() -> None:
    assert configured(BASE, {"trainer": {"max_steps": 5}}) == changed(lambda c: c["trainer"].update(max_steps=5))


@pytest.mark.parametrize("loss", [None, "Sigmoid", {"class_path": "Sigmoid"}])
def test_a_field_goes_to_the_class_that_there_is_however_it_is_written(loss: object) -> None:
    config = {"model": {} if loss is None else {"loss": loss}}
    assert configured(config, {"model.loss.beta": 0.3}) == {
        "model": {"loss": {"class_path": "Sigmoid", "init_args": {"beta": 0.3}}}
    }


def test_options_of_groups_that_the_config_does_not_have_make_them() -> None:
    found = configured({}, {"trainer.max_steps": 5, "model.optimizer.lr": 0.1})
    assert found == {
        "trainer": {"max_steps": 5},
        "model": {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1}}},
    }


@pytest.mark.parametrize(
    "point",
    [
        {"model.loss.beta": 0.9, "data.max_length": 64},
        {"model.loss": "IPO", "model.loss.beta": 0.9},
        {"model.loss": {"class_path": "IPO"}, "model.loss.beta": 0.9},
    ],
    ids=str,
)
def test_neither_the_config_nor_the_point_is_changed_by_putting_them_together(point: Point) -> None:
    config, given = copy.deepcopy(BASE), copy.deepcopy(point)
    configured(config, given)
    assert config == BASE and given == point


# A point's folder


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"model.loss.beta": 0.1}, {"model.loss.beta": 0.3}),
        ({"model.loss": "IPO"}, {"model.loss": "IPO", "model.loss.beta": 0.1}),
        ({"seed_everything": 1}, {"seed_everything": True}),
        ({"model.checkpoint": "gpt2"}, {"model.reference.checkpoint": "gpt2"}),
        ({"model.checkpoint": "a/b"}, {"model.checkpoint": "a_b"}),
        ({"data.source": ["a", "b"]}, {"data.source": "['a', 'b']"}),
        ({"data.source": "a", "seed_everything": 1}, {"data.source": "a,seed_everything=1"}),
    ],
    ids=str,
)
def test_two_different_points_never_share_a_folder(one: Point, other: Point) -> None:
    assert name_of(one) != name_of(other)


@pytest.mark.parametrize(
    "point",
    [
        {"model.checkpoint": "../models/gpt2"},
        {"model.checkpoint": "/"},
        {"data.source": [f"runs/some/longer/place/of/pairs-{number}.jsonl" for number in range(8)]},
        {f"model.optimizer.option_{number}": number for number in range(20)},
        {"data.format": "é" * 200},
    ],
    ids=lambda point: str(point)[:40],
)
def test_a_points_name_is_one_folder_that_a_disk_can_have(tmp_path: Path, point: Point) -> None:
    (tmp_path / name_of(point)).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name_of(point)]


def test_a_points_name_says_what_it_sets() -> None:
    name = name_of({"model.loss": "IPO", "model.loss.beta": 0.1})
    assert name.index("IPO") < name.index("beta=0.1")


# Running, with processes that take no time


def both(*betas: float | None) -> list[tuple[str, float | None]]:
    """A fit and a test of each."""
    return [(verb, beta) for beta in betas for verb in ("fit", "test")]


def test_every_point_is_fitted_and_then_tested_in_the_grids_order(tmp_path: Path, runs: Runs, config: Path) -> None:
    sweep.sweep([config], grid(tmp_path, "model.loss.beta: [0.5, 0.1, 0.2]"), tmp_path / "out")
    assert runs.asked == both(0.5, 0.1, 0.2)
    expected = [
        {"model.loss.beta": beta, "val/rewards/accuracies": 1 - beta, "test/kl": 1 / beta} for beta in (0.5, 0.1, 0.2)
    ]
    found = [{key: float(value) for key, value in row.items()} for row in table(tmp_path / "out")]
    assert found == [{"val/loss": 0.5} | row for row in expected]


def test_a_points_folder_has_the_config_that_it_ran_with(tmp_path: Path, runs: Runs, config: Path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("trainer: {max_steps: 9}\n")
    sweep.sweep([config, later], grid(tmp_path, "model.loss.beta: [0.2]"), tmp_path / "out")
    folder = tmp_path / "out" / name_of({"model.loss.beta": 0.2})
    expected = changed(lambda c: (c["trainer"].update(max_steps=9), c["model"]["loss"]["init_args"].update(beta=0.2)))
    expected["model"]["reference"] = "CachedLogps"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == expected


@pytest.mark.parametrize(
    ("option", "reference"),
    [
        ("model.loss: [Sigmoid]", "CachedLogps"),
        ("model.loss: [SimPO]", None),
        ("model.reference: [FrozenModel]", {"class_path": "FrozenModel"}),
        ("model.lora: [{r: 2}]", "CachedLogps"),
    ],
)
def test_runs_share_the_references_scores_where_they_have_one_and_name_no_other(
    tmp_path: Path, runs: Runs, config: Path, option: str, reference: object
) -> None:
    sweep.sweep([config], grid(tmp_path, option), tmp_path / "out")
    [found] = (tmp_path / "out").glob("*/config.yaml")
    assert yaml.safe_load(found.read_text())["model"].get("reference") == reference


def test_a_fit_that_was_ended_from_outside_is_not_finished_though_its_status_is_0(
    tmp_path: Path, runs: Runs, config: Path
) -> None:
    """A signal ends a fit without a word: its last figures are of a policy that is not done, and there is no export."""
    points = grid(tmp_path, "model.loss.beta: [0.5, 0.1]")
    runs.ended = {0.5}
    with pytest.raises(InputError, match="fit was ended before it was done"):
        sweep.sweep([config], points, tmp_path / "out")
    assert [row["model.loss.beta"] for row in table(tmp_path / "out")] == ["0.1"]
    runs.asked.clear()
    runs.ended = set()
    sweep.sweep([config], points, tmp_path / "out")
    assert runs.asked == both(0.5)


def test_a_finished_point_is_not_run_again_and_is_reported_all_the_same(
    tmp_path: Path, runs: Runs, config: Path
) -> None:
    sweep.sweep([config], grid(tmp_path, "model.loss.beta: [0.5, 0.1]"), tmp_path / "out")
    before = table(tmp_path / "out")
    (tmp_path / "out" / "sweep.csv").unlink()
    (tmp_path / "out" / "frontier.png").unlink()
    runs.asked.clear()
    sweep.sweep([config], grid(tmp_path, "model.loss.beta: [0.5, 0.1]"), tmp_path / "out")
    assert runs.asked == [] and table(tmp_path / "out") == before
    image(tmp_path / "out" / "frontier.png")
    sweep.sweep([config], grid(tmp_path, "model.loss.beta: [0.5, 0.2, 0.1]"), tmp_path / "out")
    assert runs.asked == both(0.2)
    assert [row["model.loss.beta"] for row in table(tmp_path / "out")] == ["0.5", "0.2", "0.1"]


def test_a_changed_config_runs_every_point_again_and_only_once(tmp_path: Path, runs: Runs, config: Path) -> None:
    points = grid(tmp_path, "model.loss.beta: [0.5, 0.1]")
    sweep.sweep([config], points, tmp_path / "out")
    config.write_text(yaml.safe_dump(changed(lambda c: c["trainer"].update(max_steps=3))))
    runs.asked.clear()
    sweep.sweep([config], points, tmp_path / "out")
    assert runs.asked == both(0.5, 0.1)
    sweep.sweep([config], points, tmp_path / "out")
    assert runs.asked == both(0.5, 0.1)


def test_a_point_has_no_figures_but_those_of_its_present_config(tmp_path: Path, runs: Runs, config: Path) -> None:
    """What an earlier config's run found, and this one's did not, is no figure of this one."""
    points = grid(tmp_path, "seed_everything: [0]")
    sweep.sweep([config], points, tmp_path / "out")
    assert table(tmp_path / "out")[0]["val/rewards/accuracies"] == "0.5"
    config.write_text(yaml.safe_dump(changed(lambda c: c["model"].update(loss={"class_path": "SFT"}))))
    sweep.sweep([config], points, tmp_path / "out")
    assert table(tmp_path / "out") == [{"seed_everything": "0", "val/loss": "0.5", "test/kl": "1.0"}]


@pytest.mark.parametrize(
    ("stop_at", "left"),
    [(0, both(0.5, 0.1)), (1, [("test", 0.5), *both(0.1)]), (2, both(0.1)), (3, [("test", 0.1)])],
)
def test_an_interrupted_sweep_goes_on_with_the_verb_that_was_not_finished(
    tmp_path: Path, runs: Runs, config: Path, stop_at: int, left: list[tuple[str, float]]
) -> None:
    points = grid(tmp_path, "model.loss.beta: [0.5, 0.1]")
    runs.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep([config], points, tmp_path / "out")
    assert not (tmp_path / "out" / "sweep.csv").exists()
    runs.stop_at = None
    runs.asked.clear()
    sweep.sweep([config], points, tmp_path / "out")
    assert runs.asked == left
    assert [float(row["test/kl"]) for row in table(tmp_path / "out")] == [2.0, 10.0]


@pytest.mark.parametrize("stop_at", [0, 1])
def test_a_point_that_was_interrupted_after_its_config_changed_is_not_finished(
    tmp_path: Path, runs: Runs, config: Path, stop_at: int
) -> None:
    """Though it was finished with another config before."""
    points = grid(tmp_path, "model.loss.beta: [0.5]")
    sweep.sweep([config], points, tmp_path / "out")
    config.write_text(yaml.safe_dump(changed(lambda c: c["trainer"].update(max_steps=3))))
    runs.stop_at = len(runs.asked) + stop_at
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep([config], points, tmp_path / "out")
    runs.stop_at = None
    runs.asked.clear()
    sweep.sweep([config], points, tmp_path / "out")
    assert runs.asked == both(0.5)[stop_at:]


def test_a_failing_point_is_named_with_its_cause_and_the_others_are_run_and_reported(
    tmp_path: Path, runs: Runs, config: Path
) -> None:
    points = grid(tmp_path, "model.loss.beta: [0.5, 3, 0.1]")
    for asked in ([*both(0.5), ("fit", 3), *both(0.1)], [("fit", 3)]):  # the second time only what failed
        with pytest.raises(InputError, match="1 of 3 points failed") as error:
            sweep.sweep([config], points, tmp_path / "out")
        message = str(error.value)
        assert f"; {name_of({'model.loss.beta': 3})}: " in message and "beta must be at most 1, got 3" in message
        assert "log.txt" in message and "\n" not in message
        assert runs.asked == asked
        assert [row["model.loss.beta"] for row in table(tmp_path / "out")] == ["0.5", "0.1"]
        image(tmp_path / "out" / "frontier.png")
        runs.asked.clear()


def test_a_sweep_of_which_every_point_fails_names_them_all(tmp_path: Path, runs: Runs, config: Path) -> None:
    with pytest.raises(InputError, match="2 of 2 points failed") as error:
        sweep.sweep([config], grid(tmp_path, "model.loss.beta: [2, 3]"), tmp_path / "out")
    assert all(f"; {name_of({'model.loss.beta': beta})}: " in str(error.value) for beta in (2, 3))
    assert not (tmp_path / "out" / "sweep.csv").exists()


def test_different_points_of_one_grid_keep_runs_of_their_own(tmp_path: Path, runs: Runs, config: Path) -> None:
    """Here two options that end in the same word."""
    text = "- {model.checkpoint: gpt2}\n- {model.tokenizer: gpt2}\n"
    text += "- {model.reference: FrozenModel, model.reference.checkpoint: gpt2}\n"
    sweep.sweep([config], grid(tmp_path, text), tmp_path / "out")
    assert len([path for path in (tmp_path / "out").iterdir() if path.is_dir()]) == 3
    runs.asked.clear()
    sweep.sweep([config], grid(tmp_path, text), tmp_path / "out")
    assert runs.asked == []


def test_inputs_are_read_before_anything_is_written(tmp_path: Path, runs: Runs, config: Path) -> None:
    good = grid(tmp_path, "model.loss.beta: [0.5]")
    for configs, points in (([tmp_path / "none.yaml"], good), ([config], tmp_path / "none.yaml")):
        with pytest.raises(InputError, match=r"none\.yaml"):
            sweep.sweep(configs, points, tmp_path / "out")
    assert runs.asked == [] and not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_an_error_that_names_it(
    tmp_path: Path, runs: Runs, config: Path
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match="file"):
            sweep.sweep([config], grid(tmp_path, "model.loss.beta: [0.5]"), place)
    assert runs.asked == []
