"""The kernels that PyTorch's profiler records in a run, and the table of them."""

import subprocess
import sys

import torch

from bench.kernels import Kernel, recorded, table, why_not


def test_each_operator_is_recorded_once() -> None:
    """The real profiler records each operator once; on the CPU it works in the same way."""
    left, right = torch.ones(64, 64), torch.ones(64, 64)
    found = recorded(lambda: torch.mm(left, right).relu(), "CPU")
    names = [kernel.name for kernel in found]

    assert 1 == names.count("aten::mm")
    assert names.index("aten::mm") < names.index("aten::relu")
    assert all(kernel.began <= kernel.ended for kernel in found)


def test_table_separates_kernels_and_gaps() -> None:
    """Two gaps, of 10 and 30 us; kernels that overlap leave none."""
    kernels = [
        Kernel("gemm", 100, 150),
        Kernel("split", 120, 160),
        Kernel("gemm", 170, 220),
        Kernel("a" * 100, 250, 260),
    ]
    head, _, *rows = table(kernels).splitlines()

    assert "4 kernels within 0.16 ms; 0.04 ms of that in 2 gaps" in head
    assert [["100.0", "62.5%", "2", "gemm"], ["40.0", "25.0%", "1", "split"]] == [
        row.split() for row in rows[:2]
    ]
    assert all(len(row) <= 90 for row in rows)


def test_omitted_kernels_are_summed_in_one_line() -> None:
    """If there are many kernel names, the last ones are summed in one line."""
    kernels = [Kernel(f"kernel {number}", 10 * number, 10 * number + 5) for number in range(20)]
    last = table(kernels).splitlines()[-1]

    assert ["25.0", "12.8%", "5", "all", "others"] == last.split()


def test_profiling_without_a_device_fails() -> None:
    """Without a CUDA device, --profile fails at once with the reason."""
    command = [sys.executable, "-m", "bench.gpu", "--small", "--device=cpu", "--profile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    if why_not():
        assert done.stderr.splitlines()[-1] == f"--profile: {why_not()}"
        assert done.returncode == 1
    else:
        assert "no kernels were recorded" in done.stdout
