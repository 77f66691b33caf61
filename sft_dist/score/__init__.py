"""Rewards of a reward model for records of any format."""
