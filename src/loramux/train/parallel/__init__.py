"""Training by several processes: `torchrun --nproc-per-node 2 -m loramux train recipe.yaml --out DIR`.

Processes share the micro-batches of a step and add up what comes of them (`team.py`); the first one writes.
"""

from loramux.train.parallel.group import (
    Group,
    ParallelError,
    connected,
    is_first_process,
    local_device,
)

__all__ = ["Group", "ParallelError", "connected", "is_first_process", "local_device"]
