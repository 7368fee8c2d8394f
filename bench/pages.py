"""Large pages for whole benchmark processes.

Where pages of 4 KB are translated twice, as in virtual machines, reading weights that no cache holds can take several
times as long, and how long depends on where the system found free pages: no two runs agree. Benchmarks therefore run
every candidate, ours and peers alike, on pages of 2 MB where the system has them, unless `--small-pages` is given.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb=1"  # malloc asks for transparent huge pages (glibc 2.35 and later; others ignore it)


def use_large_pages() -> None:
    """Starts this process again with the tunable, which is read before a program begins."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, TUNABLE)))
        os.execv(sys.executable, sys.orig_argv)


def large_share() -> float:
    """Of this process's own memory, the part on large pages; 0 where the system does not say."""
    path = Path("/proc/self/smaps_rollup")
    if not path.exists():
        return 0.0
    kb = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in path.open()) if "kB" in rest}
    return kb.get("AnonHugePages", 0) / max(kb.get("Anonymous", 0), 1)
