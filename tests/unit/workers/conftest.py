"""Checkpoints and the exactness rule."""

from tests.written import exactness, maverick, one_thread, pytest_terminal_summary, scout

__all__ = ["exactness", "maverick", "one_thread", "pytest_terminal_summary", "scout"]
