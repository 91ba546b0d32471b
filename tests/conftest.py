"""Shared by all tests: where they find each other, and what they leave behind."""

import sys
from pathlib import Path

import pytest

# Ranks import test modules by name, whatever import mode pytest runs in.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    import launcher

    launcher.close_pools()
