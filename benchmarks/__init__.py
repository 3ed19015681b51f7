"""Measures what the documentation promises: `make bench`."""
