"""Tests that need a CUDA device are skipped where there is none."""

import pytest

from generator_svc.cuda import device_count


def pytest_collection_modifyitems(items):
    on_device = [item for item in items if item.get_closest_marker("gpu")]
    if on_device and not device_count():
        for item in on_device:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
