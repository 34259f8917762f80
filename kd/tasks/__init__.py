"""Tasks: what a batch means and how a result is judged."""
