"""Evidence: load, cut into passages, embed, index, retrieve, and render into prompts. Torch-free."""
