"""Tests, in a folder for each room; what they share is in `tests.nets` and `conftest.py`."""
