"""The `trivium` command. Starts the services and talks to them; imports none but the exporter."""
