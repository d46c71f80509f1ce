"""Rows in, batches out.

rows = load_examples(source, tokenizer, template, sequence_len)     -> list[Example]
rows = load_pairs(source, tokenizer, template, sequence_len)        -> list[Example], chosen and rejected by turns
plan = plan_batches([len(r) for r in rows], size, seed=0, epochs=1) -> list[list[int]]
batch = collate([rows[i] for i in plan[0]], pad_token_id)           -> dict of tensors
"""

from loramux.data.batches import plan_batches
from loramux.data.collate import collate
from loramux.data.encode import load_examples
from loramux.data.example import Example
from loramux.data.packing import collate_packed, first_fit, segment_mask
from loramux.data.pairs import load_pairs
from loramux.data.tasks import TaskRow, answer_text, question, read_task
from loramux.recipe import DataSource

__all__ = [
    "DataSource",
    "Example",
    "TaskRow",
    "answer_text",
    "collate",
    "collate_packed",
    "first_fit",
    "load_examples",
    "load_pairs",
    "plan_batches",
    "question",
    "read_task",
    "segment_mask",
]
