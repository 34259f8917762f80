"""Losses: tensors in, one scalar out. One file per method family; a pure function with a thin module around it each."""
