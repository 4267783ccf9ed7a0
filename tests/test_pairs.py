"""A row of a column of ids is the table's own, however the table was put together, and needs no copy of it."""

import pickle

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.pairs import Ids


def table_of(lists: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"prompt": lists})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=5), min_size=1, max_size=4),
    st.data(),
)
def test_each_row_is_the_tables_own(parts: list[list[list[int]]], data: st.DataObject) -> None:
    whole = concatenate_datasets([table_of(part) for part in parts])
    count = len(whole)
    for table in (
        whole,
        whole.select(range(count // 2, count)),
        whole.select(data.draw(st.permutations(range(count)))),
    ):
        ids = Ids(table, "prompt")
        assert [ids[row].tolist() for row in range(len(table))] == table["prompt"][:]


def test_a_row_is_a_view_into_the_file_and_the_file_is_not_sent_to_other_processes(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    table_of([[number] * 100 for number in range(1000)]).save_to_disk(folder)
    ids = Ids(Dataset.load_from_disk(folder), "prompt")
    assert not ids[7].flags.owndata and np.shares_memory(ids[7], ids.values[0])
    sent = pickle.dumps(ids)
    assert len(sent) < 10_000 and pickle.loads(sent)[7].tolist() == [7] * 100
