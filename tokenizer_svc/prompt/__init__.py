"""From a conversation to the prompt's token ids."""
