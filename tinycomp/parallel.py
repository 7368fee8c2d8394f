"""Independent pieces of work on every core: one thread each, so that no parallel region waits for another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")
R = TypeVar("R")


def in_order(function: Callable[[T], R], items: Iterable[T], device: torch.device) -> Iterator[R]:
    """`function` of every item, in the order of `items`, on as many threads as torch may use.

    Each call runs its factorisations and products on one thread. Factorising a few hundred columns consists of short
    parallel regions that do not scale; whole matrices do. Off the CPU the calls run one after another.
    """
    work = list(items)
    threads = min(torch.get_num_threads(), len(work))
    if threads < 2 or device.type != "cpu":
        with torch.no_grad():
            yield from map(function, work)
        return
    before = torch.get_num_threads()

    def call(item: T) -> R:
        with torch.no_grad():
            return function(item)

    pool = ThreadPoolExecutor(threads, "tinycomp", initializer=lambda: torch.set_num_threads(1))
    try:
        with threadpool_limits(1, user_api="blas"):
            yield from pool.map(call, work)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # the initializer also set what later threads would start with
