from __future__ import annotations

import pytest

# what transformers' tests mark themselves with
MARKERS = """
accelerate_tests all_flash_attn_test bitsandbytes flash_attn_3_test flash_attn_4_test
flash_attn_test is_training_test torch_compile_test
"""


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKERS.split():
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")
