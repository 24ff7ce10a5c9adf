"""Memory of a job on a GPU that is not there.

The pipeline itself runs, on tensors without memory (`dry_run`), and what they would take is counted: `tracker` hears of
each storage, `kernels` adds what kernels take for themselves, `choices` takes the branches that CUDA would take, and
`memory` is torch's allocator as a model with the counters of the real one. The recorder that measures real runs reads
them. `predict.estimate` is the way in, `python -m wan_sweep.estimate.run JOB_FOLDER` a process of its own for it.
"""
