"""Memory is lent again only when nobody looks at it any more."""

import torch

from h1r_rl.host_memory import HostMemory


def test_a_loan_that_is_out_is_never_touched():
    memory = HostMemory()
    first = memory.lend(1 << 20).fill_(1)
    view = first[8:16].view(torch.float32).view(1, 2)
    address = first.data_ptr()
    del first
    memory.lend(1 << 20).fill_(2)
    assert view.view(torch.uint8).eq(1).all()  # a view is a loan, too
    del view
    again = memory.lend(1 << 10)
    assert again.data_ptr() != address  # the second loan's memory, which came back
    second = again.data_ptr()
    del again
    assert memory.lend(1 << 20).data_ptr() == second
    assert len(memory.lend(1 << 21)) == 1 << 21  # more than there is: fresh
    assert len(memory.lend(0)) == 0
