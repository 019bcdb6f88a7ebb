"""The traced graph and the passes that rewrite it."""
