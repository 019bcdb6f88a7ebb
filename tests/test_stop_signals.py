"""A stop signal ends every stage cleanly, however early it comes."""

import signal
import subprocess
import sys

import pytest

# Sends itself a signal when the stage first imports gRPC.
_START = """
import os, runpy, sys

class Importing:
    def find_spec(self, name, path, target=None):
        if name == "grpc":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(sys.argv[2]))

sys.meta_path.insert(0, Importing())
runpy.run_module(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("stage", ["rest_facade", "tokenizer_svc", "generator_svc"])
def test_a_stop_signal_during_the_imports_ends_the_process(stage, number):
    """As process 1 of a container it would otherwise ignore the signal, and go on to serve."""
    command = [sys.executable, "-c", _START, stage, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)
