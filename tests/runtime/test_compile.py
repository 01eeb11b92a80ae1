"""One compiled body serves all trips."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.testing import CompileCounter

from reroll.rewrite.capture.export import capture
from tests import captured


def test_the_body_is_compiled_once_for_all_trips() -> None:
    torch.manual_seed(0)
    program = capture(captured.llama().eval())
    model = program.to_module().eval()
    ids = torch.randint(3, 64, (2, 9))
    expected = model(ids, use_cache=False).logits
    counter: Any = CompileCounter()
    torch._dynamo.reset()
    for trip in range(program.loops[0].trips):
        model.get_submodule(f"model.layers.{trip}").compile(backend=counter)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert program.loops[0].trips == 4
    assert counter.frame_count == 1
