"""What a run leaves: metrics, card, figures, depth weights, and what of it goes to the Hub."""
