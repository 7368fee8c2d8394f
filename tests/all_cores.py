"""Long work of parametrised tests, run beside each other: results of all selected parameters are started together."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

CORES = os.cpu_count() or 1
_pool = ThreadPoolExecutor(CORES)
_started: dict[tuple[Callable[..., Any], Hashable], Future[Any]] = {}


def selected(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """Values of a parameter in the tests of the calling function that this run has not deselected."""
    name = request.node.originalname
    items = [item for item in request.session.items if getattr(item, "originalname", "") == name]
    return list(dict.fromkeys(item.callspec.params[parameter] for item in items))


def result(work: Callable[[Any], Any], values: list[Hashable], value: Hashable) -> Any:
    """work(value), for which threads have started on all of `values`; work waits for a process of its own."""
    for each in values:
        if (work, each) not in _started:
            _started[work, each] = _pool.submit(work, each)
    return _started[work, value].result()
