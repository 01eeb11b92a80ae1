from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from reroll.kernels import interpreter


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Whatever a kernel should have written and did not is not a number."""
    if not interpreter.active():
        pytest.skip("the kernels are tested in Triton's interpreter: TRITON_INTERPRET=1")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(2).isnan().all()
    # what lies above a diagonal may overflow, and is dropped
    with np.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)
