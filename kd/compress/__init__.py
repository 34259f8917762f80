"""Compression: what a net costs, and later what makes it cheaper."""
