"""The op `recurrence`: its fake, its costs, its text, and what is said about a wrong one."""

from __future__ import annotations

import pytest
import torch

from reroll.errors import UsageError
from reroll.mixers import find, make
from reroll.rewrite.ir.rules import find_rule


def test_the_op_is_well_formed() -> None:
    q, k, v = (torch.randn(1, n, 9, 4, requires_grad=True) for n in (4, 2, 2))
    gate = torch.nn.functional.logsigmoid(torch.randn(1, 2, 9)).requires_grad_()
    text = make("retention").text()
    torch.library.opcheck(
        torch.ops.reroll.recurrence.default, (q, k, v, [gate], "retention", text, torch.ones(1, 9))
    )


def test_unknown_names_are_said_plainly() -> None:
    with pytest.raises(UsageError, match="did you mean retention"):
        find("retantion")
    with pytest.raises(UsageError, match="there is no mixer 'nothing'"):
        find_rule("nothing")
    with pytest.raises(UsageError, match="mixer retention, option chunk_size"):
        make("retention", {"chunk_size": "many"})


def test_wrong_gates_are_refused() -> None:
    q = k = v = torch.randn(1, 2, 5, 4)
    with pytest.raises(UsageError, match=r"takes 1 gates \(log_decay\), not 0"):
        make("retention").chunk(q, k, v, ())
    with pytest.raises(UsageError, match="gate log_decay is"):
        make("retention").chunk(q, k, v, (torch.zeros(1, 2, 4),))
    with pytest.raises(UsageError, match="step takes one token, not 5"):
        make("retention").step(q, k, v, (torch.zeros(1, 2, 5),))
