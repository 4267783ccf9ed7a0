"""A stream that goes on from where another stopped yields exactly the batches that the other had left.

The oracle is a stream that was never stopped. The reader of Lightning's loader fetches a batch ahead: when a checkpoint
is written the stream has already given the batch after the last one that was trained on.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import pytest

from dpo_lightning.data import streams
from dpo_lightning.data.packing import PreferenceBatch
from dpo_lightning.data.streams import StreamedPairs
from dpo_lightning.errors import InputError
from tests.streamed import ROWS, Ledger, pairs_of, plain, seen, stream, tabled


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows compiled at once: few, so that windows, rows and chunks end at different places."""
    monkeypatch.setattr(streams, "CHUNK", 5)


@dataclass(frozen=True)
class Case:
    """A stream: how many rows of which kind each source has, its options, and epochs in which it may be stopped."""

    rows: tuple[int, ...]
    kind: str = "ranked"
    weights: tuple[float, ...] | None = None
    buffer: int = 6
    most: int | None = None
    ranks: int = 1
    accumulate: int = 1
    epochs: int = 1

    def stream(self, rank: int = 0) -> StreamedPairs:
        make, format = ROWS[self.kind]
        parts = [make(count, name) for count, name in zip(self.rows, "abc", strict=False)]
        options = {"buffer": self.buffer, "most": self.most, "ranks": self.ranks, "accumulate": self.accumulate}
        return stream(parts, self.weights, format=format, rank=rank, **options)


CASES = {
    "one source": Case((7,), buffer=4, epochs=2),
    "a window for each step": Case((5,), buffer=1),
    "windows that end with the source": Case((8,), kind="plain", buffer=4, epochs=2),
    "two sources": Case((2, 4), buffer=4),
    "two sources with weights": Case((2, 4), weights=(1, 2), buffer=6),
    "a limit and accumulation on the second of two ranks": Case((9,), most=7, buffer=8, ranks=2, accumulate=2),
}


@dataclass(frozen=True)
class Stop:
    """Where a run may have been stopped: batches trained on since its start, and the state that it kept."""

    trained: int
    state: dict[str, Any]


#: When a run is stopped: behind a batch, with the next one fetched or not, or in it, with the next one fetched.
When = Literal["ahead", "behind", "inside"]


def follow(batches: StreamedPairs, epochs: int, when: When = "ahead") -> tuple[list[PreferenceBatch], list[Stop]]:
    """The batches of so many epochs, and a stop at each of them."""
    given: list[PreferenceBatch] = []
    stops: list[Stop] = []
    for _ in range(epochs):
        reader, done = iter(batches), 0
        batch = next(reader, None)
        while batch is not None:
            given.append(batch)
            done += 1
            following = None if when == "behind" else next(reader, None)
            less = int(when == "inside")
            state = json.loads(json.dumps(batches.state(done - less)))  # a checkpoint is plain data
            stops.append(Stop(len(given) - less, state))
            batch = next(reader, None) if when == "behind" else following
    return given, stops


def rest(case: Case, stop: Stop, rank: int, count: int) -> list[PreferenceBatch]:
    """The first batches after a stop, over an epoch's end."""
    resumed = case.stream(rank)
    resumed.resume(stop.state)
    return list(islice((batch for _ in range(2) for batch in resumed), count))


@pytest.mark.parametrize(
    ("name", "when"),
    [*((name, "ahead") for name in CASES), *(("a window for each step", when) for when in ("behind", "inside"))],
)
def test_from_every_batch_on_a_resumed_stream_yields_exactly_the_rest(name: str, when: When) -> None:
    case, rank = CASES[name], CASES[name].ranks - 1
    given, stops = follow(case.stream(rank), case.epochs + 1, when)
    expected, epoch = [seen(batch) for batch in given], len(given) // (case.epochs + 1)
    assert epoch >= 2
    for stop in stops[: case.epochs * epoch]:
        left = -stop.trained % epoch  # of its epoch, and one batch more
        found = [seen(batch) for batch in rest(case, stop, rank, left + 1)]
        assert found == expected[stop.trained : stop.trained + left + 1], stop


@pytest.mark.parametrize("name", ["one source", "two sources with weights"])
def test_a_resumed_stream_keeps_the_states_that_the_other_would_have_kept(name: str) -> None:
    """So that it may be stopped again, and again."""
    case = CASES[name]
    given, stops = follow(case.stream(), 2)
    middle = len(given) // 4  # in the first epoch
    resumed = case.stream()
    resumed.resume(stops[middle - 1].state)
    states = []
    for epoch in range(2):
        reader, done = iter(resumed), 0 if epoch else middle
        batch = next(reader, None)
        while batch is not None:
            done, batch = done + 1, next(reader, None)
            states.append(resumed.state(done))
    assert states == [stop.state for stop in stops[middle:]]


def test_before_its_first_batch_a_stream_is_at_its_beginning() -> None:
    case = CASES["one source"]
    given, _ = follow(case.stream(), 1)
    started = case.stream()
    next(iter(started))
    for state in (started.state(0), case.stream().state(0)):
        resumed = case.stream()
        resumed.resume(state)
        assert [seen(batch) for batch in resumed] == [seen(batch) for batch in given]


def test_an_epoch_that_was_left_in_its_midst_is_followed_by_the_next_from_its_beginning() -> None:
    """As when the number of an epoch's batches is limited."""
    case = CASES["one source"]
    given, stops = follow(case.stream(), 2)
    first = next(stop.trained for stop in stops if stop.state["epoch"] == 1)
    left = case.stream()
    next(iter(left))
    assert [seen(batch) for batch in left] == [seen(batch) for batch in given[first:]]


def test_a_resumed_stream_hands_over_the_ledger_from_where_it_begins_and_once() -> None:
    """What stands before it, or in a later epoch, stands in the ledger of the stream that was stopped."""
    make, format = ROWS["ranked"]
    rows = make(12)
    expected = tabled(rows, format).ledger
    _, stops = follow(stream([rows], format=format, buffer=4), 2)
    for stop in stops[2::4]:
        kept = Ledger()
        resumed = stream([rows], format=format, buffer=4, keep=kept)
        resumed.resume(stop.state)
        list(islice((batch for _ in range(2) for batch in resumed), len(stops) - stop.trained))
        [place] = stop.state["window"]["places"]
        begun = (place["row"], place["pair"])
        left = [] if stop.state["epoch"] else [line for line in expected if (line["row"], line["pair"]) >= begun]
        assert kept.lines == left, stop
    assert len(expected) > 0


def test_a_limited_stream_that_is_resumed_hands_nothing_over_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2 to 5, 6 to 9 and 10 to 13 are compiled at once; in the next epoch 12 to 15: of these 12 was bad before."""
    monkeypatch.setattr(streams, "CHUNK", 4)
    rows = plain(30, bad=range(0, 30, 3))
    _, stops = follow(stream([rows], buffer=2, most=9), 1)
    kept = Ledger()
    resumed = stream([rows], buffer=2, most=9, keep=kept)
    resumed.resume(stops[0].state)
    assert sum(len(pairs_of(*resumed)) for _ in range(2)) == 7 + 9
    assert [line["row"] for line in kept.lines] == [3, 6, 9, 12, 15]


def test_ids_of_a_resumed_stream_are_those_of_the_table() -> None:
    make, format = ROWS["ranked"]
    rows = make(10)
    expected = tabled(rows, format).pairs
    _, stops = follow(stream([rows], format=format, buffer=4), 1)
    for stop in stops[2::3]:
        resumed = stream([rows], format=format, buffer=4)
        resumed.resume(stop.state)
        assert set(pairs_of(*resumed)) <= set(expected)


def test_bad_rows_before_a_stop_count_towards_the_share_after_it() -> None:
    """Two bad rows of 20 are within the share, three are not; the third is at the end."""
    stops = follow(stream([plain(20, bad=(1, 8))], bad_rows=0.1, buffer=4), 1)[1]
    for stop in (stops[1], stops[5]):
        for bad, whole in (((1, 8), True), ((1, 8, 19), False)):
            resumed = stream([plain(20, bad=bad)], bad_rows=0.1, buffer=4)
            resumed.resume(stop.state)
            with nullcontext() if whole else pytest.raises(InputError, match="3 of 20 rows cannot be used"):
                list(resumed)
