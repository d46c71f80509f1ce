"""How much of a pipeline over several devices stands still: the formulas of LoRAPP, and a simulator that counts it.

mLoRA (Ye et al., arXiv 2312.02515v2): layers are split into D stages; a job has at most one mini-batch in flight, from
its forward to its optimizer step, so its parameters are never stale, and other jobs fill the gaps. loramux trains on
one device per process; these say what a pipeline would gain.

Letters: D stages, N micro-batches of a mini-batch, J jobs in flight.
"""

from __future__ import annotations

Pass = tuple[int, int]  # job, micro-batch
Place = tuple[int, bool, int]  # stage, whether it goes back, since when


def gpipe_bubble(stages: int, micro_batches: int) -> float:
    """(D - 1) / (N + D - 1): one job, all micro-batches forward, then all backward."""
    _check(stages, micro_batches)
    return (stages - 1) / (micro_batches + stages - 1)


def lorapp_bubble(stages: int, jobs: int, micro_batches: int = 1) -> float:
    """max((D - 1 + N - J N) / (D + N - 1), 0); with N = 1 this is max((D - J) / D, 0)."""
    _check(stages, jobs, micro_batches)
    free = stages - 1 + micro_batches - jobs * micro_batches
    return max(free / (stages + micro_batches - 1), 0.0)


def relative_throughput(before: float, after: float) -> float:
    """Of one pipeline whose bubble ratio goes from `before` to `after`."""
    return (1 - after) / (1 - before)


def simulated_bubble(stages: int, jobs: int, micro_batches: int = 1, time: int = 600) -> float:
    """The share of stage time that stands still in a full pipeline in which every pass takes one unit.

    A mini-batch goes through the stages forward, micro-batch by micro-batch, and then back; its job starts the next
    one when the last has come back. A stage that could do both takes the backward pass, then what came first.
    """
    _check(stages, jobs, micro_batches)
    at: dict[Pass, Place] = {
        (job, part): (0, False, 0) for job in range(jobs) for part in range(micro_batches)
    }
    busy = 0
    for now in range(1, time + 1):
        for key in _chosen(at):
            stage, is_back, _ = at.pop(key)
            busy += now > time // 2
            if not is_back:
                last = stage == stages - 1
                at[key] = (stage, True, now) if last else (stage + 1, False, now)
            elif stage > 0:
                at[key] = (stage - 1, True, now)
        for job in range(jobs):
            if not any(key[0] == job for key in at):
                at |= {(job, part): (0, False, now) for part in range(micro_batches)}
    return 1 - busy / ((time - time // 2) * stages)


def _chosen(at: dict[Pass, Place]) -> list[Pass]:
    """One pass per stage. A backward waits for the forwards of all micro-batches of its job."""
    best: dict[int, tuple[tuple[bool, int, Pass], Pass]] = {}
    for key, (stage, is_back, since) in at.items():
        if is_back and any(other[0] == key[0] and not at[other][1] for other in at):
            continue
        rank = (not is_back, since, key)
        if stage not in best or rank < best[stage][0]:
            best[stage] = (rank, key)
    return [key for _, key in best.values()]


def _check(*counts: int) -> None:
    if min(counts) < 1:
        raise ValueError(f"stages, jobs and micro-batches are at least 1, got {counts}")
