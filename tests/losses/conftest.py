"""Tests of losses run what users run."""

import pytest


@pytest.fixture(autouse=True)
def _as_users_do(all_optimizations: None) -> None:
    """The compiler's results are part of what is tested: sums, memory."""
