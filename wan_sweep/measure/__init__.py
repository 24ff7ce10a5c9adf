"""Listeners that turn a pipeline's spans into numbers, and what is made of their files. Torch is the worker's alone."""
