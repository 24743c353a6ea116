"""Vocabulary shared by every layer: records, configuration, errors, and the domains that ship."""
