"""All replicas of the next stage: where they are, how they are, and which one takes a call."""
