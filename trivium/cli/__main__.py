"""`python -m trivium.cli` is the same as `trivium`."""

from trivium.cli.main import app

app()
