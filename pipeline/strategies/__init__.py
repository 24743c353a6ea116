"""Strategies: ways to get training data out of a teacher, all with one record and one signature."""
