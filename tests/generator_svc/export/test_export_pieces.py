"""A graph that is too large to load at once is verified in pieces, with the same results."""

from __future__ import annotations

import numpy as np
import pytest

from generator_svc.export import verify
from generator_svc.export.checkpoint.checkpoint import load_checkpoint
from generator_svc.export.checkpoint.source import locate
from tests.tiny_models import tiny_checkpoint, tiny_model_directory


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gpt-oss"])
def test_every_layer_by_itself_gives_the_same_logits(family, prompt, monkeypatch):
    """What all layers read, such as the rows' lengths, is available to each of them."""
    decoder = load_checkpoint(locate(str(tiny_checkpoint(family)))).decoder
    graph = tiny_model_directory(family) / "model.onnx"
    whole = verify.GraphRunner(graph, decoder)
    monkeypatch.setattr(verify, "MAX_WHOLE_BYTES", 1)
    monkeypatch.setattr(verify, "MAX_PIECE_BYTES", 1)
    cut = verify.GraphRunner(graph, decoder)
    tokens = prompt(40)

    assert whole.is_whole
    assert not cut.is_whole
    np.testing.assert_allclose(whole.run(tokens), cut.run(tokens), atol=1e-5)
