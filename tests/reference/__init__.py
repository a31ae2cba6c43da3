"""Slow, dense NumPy implementations that the package is compared with."""
