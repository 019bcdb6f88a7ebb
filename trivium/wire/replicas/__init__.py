"""The replicas of the next stage: their addresses, their health, and which one takes a call."""
