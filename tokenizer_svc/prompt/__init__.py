"""Turns a conversation into the prompt's token ids."""
