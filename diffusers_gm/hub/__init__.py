"""Models for the Hub: their cards, and the command that uploads them."""
