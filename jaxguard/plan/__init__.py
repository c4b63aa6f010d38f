"""Compile the training step for hardware that is not here, and say what it would need."""
