"""The checkpoint to export: where it comes from, its shape and its weights."""
