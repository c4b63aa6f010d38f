"""What the tests of the command share."""

from fake_guard import guard, run

__all__ = ["guard", "run"]
