"""Texts and exchanges checked against a policy: `from jaxguard.check import check`."""

from jaxguard.check.checking import Checked, check, check_many

__all__ = ["Checked", "check", "check_many"]
