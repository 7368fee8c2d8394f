"""Weights on large pages of memory."""

from __future__ import annotations

import mmap
import re
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

_PAGE, _LINE = 2 << 20, 64  # bytes


def huge_pages_(model: nn.Module) -> int:
    """Moves the weights of `model` that are in the memory of the CPU to pages of 2 MB, and changes nothing else.

    Reading weights is what a token takes. Where pages of 4 KB are translated twice, as in virtual machines, that can
    take several times as long as on large pages (docs/kernels.md); elsewhere it gains little. Call it last: what makes
    new tensors, like `copy.deepcopy` or `model.to`, leaves them on ordinary pages. Weights are moved one after another,
    so that not all of them are there twice, to one mapping, which is freed with the last of them. Those that were
    mapped from a file are copies from then on. Tied weights stay tied, views of each other among them stay views, and
    optimizers, hooks and `save_pretrained` see the same parameters; a tensor that is no parameter or buffer and shares
    memory with one no longer does.

    Args:
        model: any module. Parameters and buffers on other devices and of tensor subclasses stay where they are.

    Returns:
        Bytes of its weights that are on large pages now. 0 where the system has none: not Linux, or
        /sys/kernel/mm/transparent_hugepage/enabled says "never", and then nothing is moved; or no free memory in one
        piece to make them of.

    Raises:
        OSError: the system has no room for a second copy of the weights; nothing was moved.
    """
    if not _offered():
        return 0
    users: defaultdict[int, list[Tensor]] = defaultdict(list)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided and type(tensor.data) is Tensor:
            users[tensor.untyped_storage().data_ptr()].append(tensor)
    groups = [group for address, group in users.items() if address and group[0].untyped_storage().nbytes()]
    room = sum(_whole(group[0].untyped_storage().nbytes(), _LINE) for group in groups)
    if room == 0:
        return 0
    mapping = mmap.mmap(-1, _whole(room, _PAGE) + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    begin = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
    offset = -begin % _PAGE
    with torch.no_grad():
        for group in groups:
            old = group[0].untyped_storage()
            new = torch.frombuffer(mapping, dtype=torch.uint8, count=old.nbytes(), offset=offset).untyped_storage()
            new.copy_(old)
            for tensor in group:
                place = tensor.storage_offset(), tensor.shape, tensor.stride()
                tensor.data = torch.empty(0, dtype=tensor.dtype).set_(new, *place)
            offset += _whole(new.nbytes(), _LINE)
    return min(room, _on_large_pages(begin, begin + len(mapping)))


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _offered() -> bool:
    state = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return hasattr(mmap, "MADV_HUGEPAGE") and state.exists() and "[never]" not in state.read_text()


def _on_large_pages(begin: int, end: int) -> int:
    """Bytes within these addresses, as the system counts them."""
    found, within = 0, False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            if span := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
                within = begin < int(span[2], 16) and int(span[1], 16) < end
            elif within and line.startswith("AnonHugePages:"):
                found += int(line.split()[1]) << 10
    return found
