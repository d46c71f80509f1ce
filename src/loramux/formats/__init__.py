"""Adapters on disk: PEFT folders, mixtures of them, the published MixLoRA layouts, and content digests.

Plain data in and out: nothing here knows models. Import the modules by name (`loramux.formats.peft`, ...); this file
stays light so that catching a FormatError costs no torch import.
"""

from loramux.formats.errors import FormatError

__all__ = ["FormatError"]
