"""Tables, figures and pages, made from the cards in the store alone."""
