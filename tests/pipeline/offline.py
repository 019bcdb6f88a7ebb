"""Runs a command in a network namespace with loopback only, and counts attempts to leave it.

    unshare --map-root-user --net python offline.py SECONDS COMMAND …

The command is `trivium up …`: it gets one request when it is ready, is watched for SECONDS, and is
stopped. Prints one JSON object: the response's HTTP status, the exit code, and the kernel's counts
of packets without a route (to any other host) and of datagrams to ports without a listener (a name
server on loopback).
"""

import fcntl
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx

SIOCSIFFLAGS, IFF_UP = 0x8914, 1
COUNTS = ("IpOutNoRoutes", "UdpNoPorts", "Ip6OutNoRoutes", "Udp6NoPorts")


def raise_loopback() -> None:
    with socket.socket() as anything:
        fcntl.ioctl(anything, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def counts() -> dict[str, int]:
    """The kernel's counts for this network namespace."""
    found = {}
    lines = Path("/proc/self/net/snmp").read_text().splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        kind = names.partition(":")[0]
        pairs = zip(names.split()[1:], values.split()[1:], strict=True)
        found |= {kind + name: int(value) for name, value in pairs}
    for line in Path("/proc/self/net/snmp6").read_text().splitlines():
        name, value = line.split()
        found[name] = int(value)
    return {name: found.get(name, 0) for name in COUNTS}


def ask(process: subprocess.Popen[str]) -> int:
    """The HTTP status of a request, once the command is ready."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"REST +(http://\S+)", line):
            break
    else:
        raise AssertionError(f"ended with {process.wait()} before it was ready")
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": Path(sys.argv[-1]).name, "messages": messages, "max_tokens": 4}
    with httpx.Client(trust_env=False, timeout=60) as client:
        return client.post(f"{match[1]}/chat/completions", json=body).status_code


def main() -> None:
    seconds, *command = sys.argv[1:]
    raise_loopback()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        answered = ask(process)
        time.sleep(float(seconds))
        process.send_signal(signal.SIGINT)
        process.communicate()
    print(json.dumps({"answered": answered, "ended": process.returncode, **counts()}))


if __name__ == "__main__":
    main()
