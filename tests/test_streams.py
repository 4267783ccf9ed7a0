"""A stream trains on the pairs that a table of the same rows would, a window at a time, however the work is split.

The oracle of what is in a source is `Reader.table` of the same rows: ids, tokens and ledger.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import pytest
from datasets import IterableDataset

from dpo_lightning.data import streams
from dpo_lightning.data.formats import all_pairs, triples
from dpo_lightning.errors import InputError
from tests.streamed import ROWS, Ledger, Row, pairs_of, plain, ranked, reader, stream, tabled


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows compiled at once: few, so that windows, rows and chunks end at different places."""
    monkeypatch.setattr(streams, "CHUNK", 3)
    return 3


# What is in an epoch


@pytest.mark.parametrize(("buffer", "chunk"), [(1, 1000), (8, 1), (8, 5), (1000, 5), (1000, 1000)])
@pytest.mark.parametrize("kind", ROWS)
def test_each_usable_pair_comes_once_an_epoch_with_the_id_and_the_tokens_that_it_has_in_a_table(
    kind: str, buffer: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHUNK", chunk)
    make, format = ROWS[kind]
    rows = make(14) if kind == "ranked" else plain(14, bad=(0, 5, 6, 13))
    batches = stream([rows], format=format, buffer=buffer)
    expected = tabled(rows, format).pairs
    assert len(expected) < 1 + expected[-1][0], "no pair was dropped"
    for _ in range(2):
        assert sorted(pairs_of(*batches)) == expected


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ROWS)
def test_sources_follow_one_another_and_a_window_may_span_them(kind: str) -> None:
    make, format = ROWS[kind]
    parts = [make(5, "a"), make(6, "b"), make(4, "c")]
    tables = [tabled(rows, format).pairs for rows in parts]
    expected = [pair for pairs in tables for pair in pairs]
    found = pairs_of(*stream(parts, format=format, buffer=4))
    for start in range(0, len(expected), 4):
        assert sorted(found[start : start + 4]) == sorted(expected[start : start + 4])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ROWS)
def test_what_is_dropped_stands_in_the_ledger_as_that_of_a_table_once_over_all_epochs(kind: str) -> None:
    make, format = ROWS[kind]
    rows = make(17) if kind == "ranked" else plain(17, bad=(0, 5, 6, 16))
    kept, expected = Ledger(), tabled(rows, format).ledger
    batches = stream([rows], format=format, keep=kept)
    list(batches)
    assert kept.lines == expected and len(expected) >= 4
    list(batches)
    assert kept.lines == expected


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("start", "run"), [(0, 3), (3, 3), (4, 8), (6, 3), (5, 4)])
@pytest.mark.parametrize("change", [{"responses": [" ", " a"]}, {"scores": [1, 1]}], ids=["bad", "ties"])
def test_rows_without_a_usable_pair_are_passed_over_however_many_come_in_a_row(
    change: Row, start: int, run: int
) -> None:
    """As many as are compiled at once, and more; at the source's start, in its midst and at its end."""
    rows = [{"prompt": f"{i}?", "responses": [" a", " b"], "scores": [1, 2]} for i in range(9)]
    rows[start : start + run] = [row | change for row in rows[start : start + run]]
    found = pairs_of(*stream([rows], format=all_pairs, buffer=4))
    assert sorted(number for number, *_ in found) == [n for n in range(9) if not start <= n < start + run]


def test_a_last_short_step_of_an_epoch_is_kept() -> None:
    batches = list(stream([plain(13)], buffer=4))
    assert [batch.pairs_in_step for batch in batches] == [2] * 6 + [1]


# Windows


@pytest.mark.parametrize(("buffer", "step", "window"), [(8, 2, 8), (9, 2, 8), (1, 2, 2), (7, 4, 4), (3, 4, 4)])
def test_a_window_is_the_next_pairs_of_the_source_in_whole_steps(buffer: int, step: int, window: int) -> None:
    rows = plain(21, bad=(3, 4))
    found = pairs_of(*stream([rows], buffer=buffer, batch_size=step))
    expected = tabled(rows).pairs
    for start in range(0, len(expected), window):
        assert sorted(found[start : start + window]) == expected[start : start + window]


@pytest.mark.parametrize("buffer", [4, 10])
def test_no_more_is_read_than_a_window_and_what_is_compiled_at_once(buffer: int, small_chunks: int) -> None:
    """However long the source is: this one has no end."""
    read = [0]

    def endless() -> Iterator[Row]:
        for row in plain(10_000):
            read[0] += 1
            yield row
        pytest.fail("read to its end")

    batches = stream([IterableDataset.from_generator(endless)], buffer=buffer)
    read[0] = 0  # the first rows are looked at beforehand
    for number, _ in enumerate(islice(batches, 16)):
        windows = number * 2 // buffer + 1
        assert windows * buffer <= read[0] <= windows * buffer + small_chunks


def test_each_window_of_each_epoch_and_each_seed_has_an_order_of_its_own() -> None:
    orders = []
    for seed in (0, 1):
        batches = stream([plain(32)], buffer=16, seed=seed)
        for _ in range(3):
            numbers = [number for number, *_ in pairs_of(*batches)]
            orders += [tuple(numbers[:16]), tuple(number - 16 for number in numbers[16:])]
    assert len(set(orders)) == 12 and tuple(range(16)) not in orders


def test_the_order_is_a_function_of_the_seed_alone() -> None:
    one, other = (stream([plain(20)], buffer=8, seed=3) for _ in range(2))
    for _ in range(2):
        assert pairs_of(*one) == pairs_of(*other)


def test_pairs_are_mixed_over_the_whole_window() -> None:
    found = [number for number, *_ in pairs_of(*stream([plain(64)], buffer=64))]
    assert 8 < sum(number >= 32 for number in found[:32]) < 24


# However the work is split


@pytest.mark.parametrize(("ranks", "batch_size", "accumulate"), [(1, 2, 4), (2, 4, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1)])
def test_the_pairs_of_a_step_do_not_depend_on_how_it_is_split(ranks: int, batch_size: int, accumulate: int) -> None:
    """Of steps of 8, of which an epoch's last is short."""
    rows = ranked(14)
    whole = [sorted(pairs_of(batch)) for batch in stream([rows], format=all_pairs, buffer=16, batch_size=8)]
    split = {"batch_size": batch_size, "accumulate": accumulate, "ranks": ranks}
    parts = [list(stream([rows], format=all_pairs, buffer=16, rank=rank, **split)) for rank in range(ranks)]
    assert len({len(batches) for batches in parts}) == 1
    for number, step in enumerate(whole):
        here = slice(number * accumulate, (number + 1) * accumulate)
        mine = [batch for batches in parts for batch in batches[here]]
        assert sorted(pairs_of(*mine)) == step
        assert {batch.pairs_in_step for batch in mine} == {len(step)}


# A limit


@pytest.mark.parametrize("most", [1, 2, 5, 8, 11, 16, 1000])
def test_a_limit_takes_the_first_usable_pairs_of_every_epoch(most: int) -> None:
    rows = plain(20, bad=(1, 9))
    batches = stream([rows], most=most)
    for _ in range(2):
        assert sorted(pairs_of(*batches)) == tabled(rows).pairs[:most]


# Bad rows


def bad_every(count: int, every: int) -> list[Row]:
    return plain(count, bad=range(0, count, every))


@pytest.mark.parametrize(
    ("rows", "share", "named"),
    [
        (plain(40, bad=(30,)), 0.0, r"source 0: 1 of 40 rows .* row 30: chosen is empty "),
        (plain(4, bad=(3,)), 0.0, r"source 0: 1 of 4 .* row 3: chosen is empty "),
        (bad_every(400, 4), 0.1, r"source 0: 100 of 400 .* row 0: .*; row 4: .*; row 8: chosen is empty \.\.\."),
        (plain(40, bad=range(35, 40)), 0.1, r"source 0: 5 of 40 .* row 35: .*; row 36: .*; row 37: .*\.\.\."),
    ],
)
def test_too_many_bad_rows_are_an_error_that_names_the_first(rows: list[Row], share: float, named: str) -> None:
    with pytest.raises(InputError, match=named) as error:
        list(stream([rows], bad_rows=share))
    assert "data.bad_rows" in str(error.value)


def test_too_many_bad_rows_stop_a_run_long_before_its_source_has_come_to_its_end() -> None:
    with pytest.raises(InputError, match=r"500 of 1000 "):
        next(iter(stream([bad_every(10_000, 2)], bad_rows=0.1)))


@pytest.mark.parametrize("bad", [(0, 1), (0, 20), (38, 39)])
def test_bad_rows_within_the_share_of_the_whole_are_dropped_even_if_the_first_are_more(
    bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHUNK", 10)
    rows = plain(40, bad=bad)
    assert sorted(pairs_of(*stream([rows], bad_rows=0.05))) == tabled(rows).pairs


def test_ties_are_not_bad_rows() -> None:
    rows = [{"prompt": f"{i}?", "responses": [" a", " b"], "scores": [1, 1 + i % 2]} for i in range(20)]
    assert len(pairs_of(*stream([rows], format=all_pairs, bad_rows=0.0))) == 10


@pytest.mark.parametrize(
    ("rows", "format", "named"),
    [
        (plain(30, bad=range(30)), triples, r"source 0.*triples; row 0: chosen is empty; row 1: .*row 2: "),
        (plain(5), all_pairs, r"source 0.*first 5 rows.*all_pairs; row 0: "),
        ([{"question": "a", "good": "b"}], None, r"source 0.*good.*question"),
    ],
)
def test_a_wrong_format_dies_before_anything_is_tokenized(
    rows: list[Row], format: Callable[[Row], object], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams.StreamedSource, "_compile", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(InputError, match=named):
        stream([rows], format=format, bad_rows=0.5)


# Nothing to train on


@pytest.mark.parametrize("weights", [None, (1, 1)])
@pytest.mark.parametrize("change", [{"responses": [" ", " a"]}, {"scores": [1, 1]}], ids=["bad", "ties"])
def test_a_stream_without_a_usable_pair_is_an_error_and_no_epoch_without_end(
    change: Row, weights: tuple[float, ...] | None
) -> None:
    rows = [{"prompt": f"{i}?", "responses": [" a", " b"], "scores": [1, 2]} for i in range(9)]
    parts = [[row | change for row in rows]] if weights is None else [rows, [row | change for row in rows]]
    with pytest.raises(InputError, match=f"source {len(parts) - 1}: no row is left"):
        list(stream(parts, weights, format=all_pairs))


def test_a_length_shorter_than_every_prompt_is_refused_where_nobody_asked_for_cuts() -> None:
    with pytest.raises(InputError, match=r"source 0: data\.max_length 5 is shorter than every prompt"):
        list(stream([plain(9)], read_by=reader(max_length=5, refuse_cuts=True)))
    assert len(pairs_of(*stream([plain(9)], read_by=reader(max_length=5)))) > 0
