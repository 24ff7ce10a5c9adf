"""Listeners that turn a pipeline's spans into numbers. Only the worker imports this."""
