"""The traced graph, the passes that rewrite it, and the files it is written to."""
