"""The proof that a strategy changes no number: a recipe's model in small, trained under each and compared."""
