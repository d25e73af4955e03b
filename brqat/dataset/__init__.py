"""Data sets: every option returns Splits(train, val, test), see splits.py."""
