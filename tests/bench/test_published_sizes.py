"""The sizes in docs/models.md, compared with folders that the exporter makes."""

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
    """A model with biases, which Llamas do not have."""
    return PUBLISHED["qwen-2.5-7b"].with_config(**SMALL)


@pytest.fixture(scope="module")
def checkpoint(published, tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("sizes") / "checkpoint", published)


def test_computed_checkpoint_size_is_right(checkpoint, published):
    """The computed size is right, except for the headers of the shards."""
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))

    assert checkpoint_bytes(published.config) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("device", "precision"), [(d, p) for d, precisions in DEVICES.items() for p in precisions]
)
def test_computed_model_folder_size_is_right(checkpoint, published, device, precision, tmp_path):
    """The computed size is right, except for tensors in the graph itself and alignment."""
    folder = export_model(str(checkpoint), tmp_path / "m", ExportOptions(precision, device))
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    places = [entry for tensor in graph.initializer for entry in tensor.external_data]
    size = sum(int(entry.value) for entry in places if entry.key == "length")

    assert folder_bytes(published.config, precision, device) == pytest.approx(size, rel=0.01)
