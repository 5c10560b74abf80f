import threading
from collections.abc import Iterator

import pytest

from fetal_flax.data.prefetch import made_in_thread


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
