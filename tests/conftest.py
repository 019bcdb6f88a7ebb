"""Tests that need a CUDA device are skipped where there is none; no example is timed."""

import hypothesis
import pytest

from generator_svc.cuda import device_count

# A busy machine makes an example slow, and a slow example is no fault.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items):
    on_device = [item for item in items if item.get_closest_marker("gpu")]
    if on_device and not device_count():
        for item in on_device:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
