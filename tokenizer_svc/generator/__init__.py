"""The generator as this stage sees it: its protocol, its calls, its availability."""
