"""The sizes that docs/models.md tells, against folders that the exporter makes."""

import onnx
import pytest

from bench.published import PUBLISHED
from bench.published_sizes import DEVICES, checkpoint_bytes, folder_bytes
from bench.random_checkpoint import write_random_checkpoint
from generator_svc.export import ExportOptions, export_model

pytestmark = pytest.mark.slow

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
}


@pytest.fixture(scope="module")
def published():
    """With biases, which Llamas have not."""
    return PUBLISHED["qwen-2.5-7b"].with_config(**SMALL)


@pytest.fixture(scope="module")
def checkpoint(published, tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("sizes") / "checkpoint", published)


def test_a_checkpoint_is_as_large_as_is_told(checkpoint, published):
    """But for the headers of its shards."""
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))

    assert checkpoint_bytes(published.config) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("device", "precision"), [(d, p) for d, precisions in DEVICES.items() for p in precisions]
)
def test_a_folder_is_as_large_as_is_told(checkpoint, published, device, precision, tmp_path):
    """But for numbers that are in the graph itself, and for what aligns tensors in the file."""
    folder = export_model(str(checkpoint), tmp_path / "m", ExportOptions(precision, device))
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    places = [entry for tensor in graph.initializer for entry in tensor.external_data]
    size = sum(int(entry.value) for entry in places if entry.key == "length")

    assert folder_bytes(published.config, precision, device) == pytest.approx(size, rel=0.01)
