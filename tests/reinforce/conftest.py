"""What the tests of reinforcement learning share."""

from tiny_rollouts import guard

__all__ = ["guard"]
