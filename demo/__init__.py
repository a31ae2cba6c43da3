"""``python -m demo``: digits at batch sizes 1, 8 and 64 with Lightning, a table, a picture."""
