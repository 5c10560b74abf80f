import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from fetal_flax._util import pipeline
from fetal_flax._util.pipeline import begin_ahead, in_threads, made_in_thread, map_in_threads


@pytest.fixture(autouse=True)
def three_threads(monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "available_cpus", lambda: 3)


def test_results_keep_the_order_of_the_items():
    def slowest_first(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return -number

    assert list(map_in_threads(slowest_first, range(20))) == [-number for number in range(20)]


def test_calls_run_at_the_same_time():
    together = threading.Barrier(3, timeout=30)
    assert len(list(map_in_threads(lambda _: together.wait(), range(3)))) == 3


def test_the_caller_may_say_how_many_threads_there_are():
    together = threading.Barrier(5, timeout=30)
    assert len(list(map_in_threads(lambda _: together.wait(), range(5), 5))) == 5


def test_an_endless_sequence_is_taken_a_little_ahead():
    taken = []
    results = map_in_threads(lambda item: item, map(taken.append, itertools.count()))
    for number in range(10):
        next(results)
        assert len(taken) == number + 4


def test_an_error_of_the_items_comes_after_what_came_before_it():
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the sixth")

    seen = []
    with pytest.raises(ValueError, match="the sixth"):
        for begun in begin_ahead(str, items(), 3):
            seen.append(begun)
    assert seen == list("01234")


def test_an_error_of_a_call_is_its_futures():
    def root(number: int) -> float:
        if number == 2:
            raise ValueError("two")
        return number

    futures = list(in_threads(root, range(5)))
    assert [future.result() for future in futures if future is not futures[2]] == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="two"):
        futures[2].result()


def test_who_stops_iterating_leaves_no_thread_behind():
    before = threading.active_count()
    results = in_threads(lambda number: number, itertools.count())
    next(results)
    assert threading.active_count() > before
    del results
    assert threading.active_count() == before


def test_the_next_item_is_made_while_one_is_used():
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    ahead = made_in_thread(items())
    assert next(ahead) == 0
    assert made[1].wait(timeout=60)
    # One ahead, and no more: the others would fill the memory.
    assert not made[2].is_set()
    assert list(ahead) == [1, 2]


def test_what_goes_wrong_in_the_thread_is_said_where_the_item_is_used():
    def items() -> Iterator[int]:
        yield 0
        raise OSError("no more")

    ahead = made_in_thread(items())
    assert next(ahead) == 0
    with pytest.raises(OSError, match="no more"):
        next(ahead)
