"""Reading ahead: the same items in the same order, one made before it is asked for, errors in their place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from data.sources.read_ahead import read_ahead


def test_items_come_in_order() -> None:
    assert list(read_ahead(iter(range(20)))) == list(range(20))
    assert list(read_ahead(iter(()))) == []


def test_the_next_item_is_made_while_the_present_one_is_used() -> None:
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    with closing(read_ahead(items())) as read:
        assert next(read) == 0
        assert made[1].wait(timeout=10)
        assert not made[2].is_set()


def test_an_error_follows_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no such file")

    read = read_ahead(items())
    assert next(read) == 1
    with pytest.raises(OSError, match="no such file"):
        next(read)


def test_items_can_be_closed_after_an_early_end() -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            closed.append(True)

    with closing(items()) as source, closing(read_ahead(source)) as read:
        assert next(read) == 0
    assert closed == [True]
    assert not [t for t in threading.enumerate() if t.name.startswith("read ahead")]
