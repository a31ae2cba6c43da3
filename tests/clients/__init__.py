"""Trainers and libraries that must work with the wrapper unmodified; each is skipped where it is missing."""
