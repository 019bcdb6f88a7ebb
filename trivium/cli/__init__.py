"""The `trivium` command: starts the services and talks to them, but imports none of them."""
