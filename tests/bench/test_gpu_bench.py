"""The GPU benchmark on the CPU provider: it measures and reports, whatever the numbers are."""

import pytest

from bench.gpu import Work, measure, report
from bench.random_llama import SHAPES, make_random_llama

WORK = Work(
    shape="tiny",
    device="cpu",
    counts=(1, 3),
    prompt=6,
    output=4,
    chunk=16,
    copied_bytes=2**20,
    cuda_graphs=False,
)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_model_is_measured_and_reported(precision, tmp_path):
    """Bare runner, engine (greedy and sampled), prefill and floor, by number of sequences."""
    folder = make_random_llama(tmp_path / "tiny", SHAPES["tiny"], precision)
    measured = measure(folder, WORK)
    table = report(precision, measured, {"transformers": {1: 7.5}}).splitlines()

    assert [1, 3] == list(measured.decoding)
    for row in measured.decoding.values():
        assert min(row.bare, row.engine, row.sampled, row.floor) > 0
    assert min(measured.prefill, measured.bandwidth) > 0
    assert 0 < measured.weight_bytes < (folder / "model.onnx.data").stat().st_size
    assert ["sequences", "bare", "floor", "engine", "sampled", "transformers"] == table[1].split()
    assert ["7.5", "-"] == [line.split()[-1] for line in table[2:]]
