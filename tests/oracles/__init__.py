"""Dense, slow, obvious restatements of the papers' equations, written from the papers alone.

Nothing here imports `loramux`. Plain tensors in, plain tensors out; a whole-model runner per method
swaps the `forward` of modules of an unmodified transformers model for the time of one call.
"""
