"""One part of `loramux.demo.many`, in a process of its own: train, measure, score; prints one JSON line.

Time and memory are those of training alone: from the loaded base to the written adapters. PEFT's run is its model in a
bare loop over the same batches, with the same schedule, clipping and optimizer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.demo.many import BASE, JOINT, PEFT, Part, Setting

if TYPE_CHECKING:
    from loramux.recipe import Recipe
    from loramux.train import Job

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
DATA = Path(__file__).parent / "data"


def recipe_of(setting: Setting, part: Part) -> Recipe:
    """The jobs of a part, as a user would write them."""
    from loramux.recipe import parse_recipe

    training = {
        "steps": setting.steps,
        "micro_batch_size": setting.rows,
        "learning_rate": setting.learning_rate,
        "scheduler": "cosine",
    }
    jobs = [
        {"name": task, "data": {"train": [{"path": f"demo:{task}/train.jsonl"}]}}
        for task in part.tasks
    ]
    return parse_recipe(
        {
            "base": setting.base,
            "seed": part.seed,
            "method": {"name": "lora", "r": setting.rank, "lora_alpha": 2 * setting.rank},
            "data": {"sequence_len": setting.sequence_len},
            "training": training,
            "jobs": jobs,
            **({"joint": True} if part.kind == JOINT else {}),
        }
    )


def work(setting: Setting, part: Part, folder: Path) -> dict[str, Any]:
    """What the part leaves: {"training": ..., "scores": {task: ...}}."""
    import torch
    import transformers

    from loramux.train.run import build_job, read_base, read_tokenizer

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    jobs = recipe_of(setting, part).jobs_resolved()
    tokenizer = read_tokenizer(jobs[0])
    built = [build_job(job, tokenizer) for job in jobs]
    model = read_base(jobs[0])
    training: dict[str, Any] = {}
    _warm(model, part)
    if part.kind == PEFT:
        training = measured(lambda: train_in_peft(model, built[0], setting))
        return {"training": training, "threads": torch.get_num_threads()}
    if part.kind != BASE:
        training = measured(lambda: train(setting, part, model, built, folder))
    scores = {}
    for task in part.tasks:
        adapter = folder / _adapter(part, task) if training else None
        scores[task] = score(setting, model, tokenizer, task, adapter)
    return {"training": training, "scores": scores, "threads": torch.get_num_threads()}


def _warm(model: Any, part: Part) -> None:
    """What a first step would import, and the base's digest, are not what is measured."""
    import peft  # noqa: F401
    import torch

    from loramux.persist import digest_of_base
    from loramux.train.joint import JointTrainer  # noqa: F401

    if part.kind == BASE:
        digest_of_base(model)  # remembered on disk for the parts that follow
    some = torch.nn.Parameter(torch.zeros(1))
    some.grad = torch.zeros(1)
    torch.optim.AdamW([some], lr=0.0, fused=True).step()


def _adapter(part: Part, task: str) -> str:
    return f"{task}/adapter" if part.kind == JOINT else "adapter"


def measured(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` gives, its seconds by the wall and of the processor, and its peak memory above what there was."""
    before = _start_of_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    seconds = time.perf_counter() - wall
    peak = None if before is None else (_kib("VmHWM") - before) * 1024 / 1e6
    return {**result, "seconds": seconds, "cpu_seconds": time.process_time() - cpu, "peak_mb": peak}


def _start_of_peak() -> int | None:
    """KiB held now; None where the system cannot say what was held at most from now on."""
    try:
        RESET.write_text("5")  # Linux: the high-water mark starts again at what is held
        return _kib("VmRSS")
    except OSError:
        return None


def _kib(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def train(
    setting: Setting, part: Part, model: Any, jobs: Sequence[Job], folder: Path
) -> dict[str, Any]:
    """All jobs of the part by the trainer that `loramux train` would take; adapters are off the model again after."""
    from loramux.errors import LoramuxError
    from loramux.train import Trainer
    from loramux.train.joint import JointTrainer
    from loramux.train.run import attach_jobs

    handle = attach_jobs(model, recipe_of(setting, part).jobs_resolved())
    make = JointTrainer if part.kind == JOINT else Trainer
    results = make(model, handle, jobs, out=folder).run()
    handle.detach()
    wrong = [f"{result.name}: {result.reason}" for result in results if result.status != "finished"]
    if wrong:
        raise LoramuxError(f"not every job ended well ({'; '.join(wrong)})")
    return {
        "tokens": sum(result.tokens for result in results),
        "loss": {result.name: result.train_loss for result in results},
    }


def train_in_peft(model: Any, job: Job, setting: Setting) -> dict[str, Any]:
    """The same steps by PEFT."""
    import peft
    import torch

    from loramux.data import collate
    from loramux.train.loss import num_tokens
    from loramux.train.optim import lr_factor

    torch.manual_seed(job.seed)
    config = peft.LoraConfig(
        r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear"
    )
    wrapped: Any = peft.get_peft_model(model, config).train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    losses, tokens = [], 0
    for step, rows in enumerate(job.plan()):
        batch = collate([job.train[i] for i in rows], job.pad_token_id)
        call = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        loss = wrapped(**call, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, job.training.max_grad_norm)
        factor = lr_factor(step, setting.steps, "cosine", job.training.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = setting.learning_rate * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        tokens += num_tokens(batch)
    return {"tokens": tokens, "loss": {job.name: sum(losses[-10:]) / len(losses[-10:])}}


def score(
    setting: Setting, model: Any, tokenizer: Any, task: str, adapter: Path | None
) -> dict[str, Any]:
    """One task's test rows, with the adapter read back from its folder, or of the base."""
    import loramux
    from loramux.eval.run import evaluate_model, read_tasks

    path = DATA / task / "test.jsonl"
    rows = read_tasks([path], setting.test_rows)
    if not next(iter(rows.values()))[0].choices:
        rows = read_tasks([path], setting.generated_rows)
    handle = loramux.load(model, str(adapter), name=task) if adapter else None
    # The first is the task's own: accuracy of ranking by token, exact match, or BLEU.
    result = evaluate_model(model, tokenizer, rows, progress=False, per_row=True)[0]
    if handle is not None:
        handle.detach()
    return dict(result)


def _main(text: str) -> None:
    given = json.loads(text)
    setting = {**given["setting"], "tasks": tuple(given["setting"]["tasks"])}
    part = {**given["part"], "tasks": tuple(given["part"]["tasks"])}
    result = work(Setting(**setting), Part(**part), Path(given["folder"]))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1])
