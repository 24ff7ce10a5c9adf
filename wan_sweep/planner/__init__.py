"""Which knobs for which card: the fastest configuration that fits, by estimates and lower bounds of time.

`ladder` lists what can be done in each phase, fastest first; `search` goes down the ladders until all phases fit, with
as few estimates as that takes; `client` lets a process that must not import torch ask a child for it (`__main__`).
"""
