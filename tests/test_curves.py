"""Figures as they are read back from a metrics.csv."""

import math
from pathlib import Path

from dpo_lightning.training.curves import read_metrics


def test_a_row_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss,lr\n1,0.5,\n2,0.4,0.1\n3,0.")
    assert read_metrics(file) == {"loss": ([1, 2], [0.5, 0.4]), "lr": ([2], [0.1])}
    file.write_text(file.read_text() + "3,0.2\n")
    assert read_metrics(file) == {"loss": ([1, 2, 3], [0.5, 0.4, 0.3]), "lr": ([2, 3], [0.1, 0.2])}


def test_rows_of_something_else_are_left_out_and_what_is_not_finite_stays(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_bytes(b"step,loss\n1,\x00\n\xff,1\n2,half\n3,nan\n4,0.5,7,8\n5,0.25\n")
    steps, values = read_metrics(file)["loss"]
    assert steps == [3, 5] and math.isnan(values[0]) and values[1] == 0.25


def test_the_later_of_two_rows_stands_and_an_empty_file_has_nothing(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss\n2,0.5\n1,0.7\n2,0.4\n")
    assert read_metrics(file) == {"loss": ([1, 2], [0.7, 0.4])}
    file.write_text("")
    assert read_metrics(file) == {}
