"""What the generator is told of the form that an answer must have."""
