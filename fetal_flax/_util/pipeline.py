"""Work on a sequence that overlaps: begun ahead of its use, in order, bounded in memory."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from fetal_flax._util.machine import available_cpus

Item = TypeVar("Item")
Begun = TypeVar("Begun")
Result = TypeVar("Result")

MAX_THREADS = 16
"""More of them would wait for the interpreter, mostly."""


def begin_ahead(
    begin: Callable[[Item], Begun], items: Iterable[Item], count: int
) -> Iterator[Begun]:
    """Yields `begin(item)` of each item, in order, after `count` more have been begun.

    Items are taken, and begun, in the thread that iterates. If that fails, all that was begun
    before is yielded first.

    Args:
        begin: Begins what goes on elsewhere: in a thread, on a device.
        items: What to work on.
        count: How many are begun ahead; no more than one above it is held.
    """
    waiting: collections.deque[Begun] = collections.deque()
    failure = None
    ahead = iter(items)
    while failure is None:
        try:
            waiting.append(begin(next(ahead)))
        except StopIteration:
            break
        except Exception as error:
            failure = error
        else:
            if len(waiting) > count:
                yield waiting.popleft()
    while waiting:
        yield waiting.popleft()
    if failure is not None:
        raise failure


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Iterator[concurrent.futures.Future[Result]]:
    """Yields the future of `function(item)` of each item, in order; threads work a little ahead.

    Worth it where most of the function's time is spent outside of the interpreter, as in OpenCV's
    and NumPy's functions and in reading and writing. Whoever stops iterating waits for the calls
    that run; those that have not begun are dropped.

    Args:
        function: What the threads call.
        items: What it is called with.
        threads: How many; None takes one for each processor, at most `MAX_THREADS`.
    """
    threads = threads or min(available_cpus(), MAX_THREADS)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            yield from begin_ahead(lambda item: pool.submit(function, item), items, threads)
        except (GeneratorExit, KeyboardInterrupt):
            pool.shutdown(cancel_futures=True)
            raise


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Iterator[Result]:
    """Yields `function(item)` of each item, in order, as `in_threads` computes it."""
    return (future.result() for future in in_threads(function, items, threads))


def made_in_thread(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Yields items, each of which a thread makes while the one before it is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
