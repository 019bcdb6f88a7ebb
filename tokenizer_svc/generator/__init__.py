"""The generator, as this stage calls it."""
