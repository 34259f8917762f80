"""What is worth knowing before a long run: checks on the real data, the real teacher and a few real steps."""
