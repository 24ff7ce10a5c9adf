"""Wan2.1 video generation, written to be measured.

Importing this package imports nothing else; `wan21.models`, `wan21.request` and `wan21.options` need no
torch, so that a program that only plans runs can ask them.
"""
