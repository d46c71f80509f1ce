"""Adapters between disk and memory: which method a folder holds, and which expert's rows go to which slot.

A static adapter is one PEFT folder. A mixture has one PEFT folder per expert: `expert_<i>` where a site holds several,
`shared` for the sites that hold one, `lora` where every site holds one; frozen adapters under a gate keep their names.
A method whose experts are single ranks asks for one folder, `ranks`, that holds them all (`Method.folder_layout`).
"""

from loramux.persist.base import digest_of_base
from loramux.persist.moe_peft import write_gated
from loramux.persist.read import gated_adapter, read_adapter
from loramux.persist.write import write_adapter, write_published_mixlora

__all__ = [
    "digest_of_base",
    "gated_adapter",
    "read_adapter",
    "write_adapter",
    "write_gated",
    "write_published_mixlora",
]
