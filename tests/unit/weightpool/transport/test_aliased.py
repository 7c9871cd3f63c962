"""Memory with two addresses."""

import mmap

import torch

from sidp_sgl.weightpool.transport.shm.transport import ShmTransport
from tests.support.transports import make_transport

PAGE = mmap.PAGESIZE


def test_parts_of_memory_lie_side_by_side_at_another_address() -> None:
    transport = ShmTransport()
    ranges = [[(PAGE, PAGE), (4 * PAGE, 2 * PAGE)], [(0, PAGE), (6 * PAGE, PAGE)]]
    memory, aliases = transport.aliased(7 * PAGE, ranges)
    assert memory.numel() == 7 * PAGE and not memory.any()
    assert [alias.numel() for alias in aliases] == [3 * PAGE, 2 * PAGE]
    addresses = [tensor.data_ptr() for tensor in (memory, *aliases)]
    aliases[0].copy_(torch.arange(3 * PAGE) % 251)
    aliases[1].fill_(7)
    expected = (torch.arange(3 * PAGE) % 251).to(torch.uint8)
    assert torch.equal(memory[PAGE : 2 * PAGE], expected[:PAGE])
    assert torch.equal(memory[4 * PAGE : 6 * PAGE], expected[PAGE:])
    assert (memory[:PAGE] == 7).all() and (memory[6 * PAGE :] == 7).all()
    assert not memory[2 * PAGE : 4 * PAGE].any(), "what has one address only"
    memory[PAGE] = 99
    assert aliases[0][0] == 99
    assert [tensor.data_ptr() for tensor in (memory, *aliases)] == addresses
    transport.close()


def test_gpus_do_not_lend_yet() -> None:
    transport = make_transport("cuda")
    assert transport.page_bytes is None
    transport.close()
