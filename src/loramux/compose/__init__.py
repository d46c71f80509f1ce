"""Adapters in, adapter out: merging trained LoRAs into one plain LoRA, and lowering a mixture to one for a prompt.

One file per merging method in `mergers/`; the file name is the method's name. Everything is computed on the products
s B^T A or exactly on their factors, never on A and B apart, unless a paper says so and its page says what that costs.
"""

from __future__ import annotations

__all__: list[str] = []
