"""What is exported: where it comes from, its shape, its weights."""
