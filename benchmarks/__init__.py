"""Benchmarks: one command each, resumable, with JSON, Markdown and PNG under ``benchmarks/results``."""
