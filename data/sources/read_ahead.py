"""The next item is made in a thread while the present one is used: decoding and letterboxing release the interpreter's lock."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The items in order, one of them ahead; what making one raises is raised in its place.

    Only one thread at a time runs ``items``. Closing this generator waits for the item that is being made; then ``items`` can be closed.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read ahead") as pool:
        end = object()
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
