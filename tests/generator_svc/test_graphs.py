"""The shipped graphs are what `generator_svc.graphs.build` makes."""

import onnx
import pytest

from generator_svc.graphs import build


@pytest.mark.parametrize("path", build.BUILDERS, ids=lambda path: path.name)
def test_a_shipped_graph_is_what_its_builder_makes(path):
    """After a change: python -m generator_svc.graphs.build."""
    assert onnx.load_from_string(build.BUILDERS[path]()) == onnx.load(path)


def test_every_shipped_graph_has_a_builder():
    """Every graph file can be built again."""
    folder = next(iter(build.BUILDERS)).parent

    assert sorted(build.BUILDERS) == sorted(folder.glob("*.onnx"))
