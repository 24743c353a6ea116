"""Answering from a bundle: llama.cpp engine, assistant, terminal chat, HTTP. Torch-free."""
