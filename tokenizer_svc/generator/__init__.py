"""The generator as this stage sees it: protocol, calls, load and availability."""
