"""Prompt extension: a language model writes out a short prompt in full before anything of Wan2.1 is loaded."""
