"""The one error of an upload that is refused, and every reason it can give.

Why a table: a server answers with the code, clients and tests tell refusals apart by it, so codes are never renamed.
Refusals by `loramux.formats` keep the code they have there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from loramux.errors import LoramuxError

CODES: Mapping[str, str] = MappingProxyType(
    {
        # the parcel
        "remote": "an address of another machine; files are uploaded, never fetched",
        "archive_kind": "neither a zip nor a tar (.tar, .tar.gz)",
        "bad_archive": "an archive that cannot be read",
        "archive_link": "a link, device or other special member",
        "archive_name": "a member whose name is not a plain relative path",
        "encrypted": "a member that needs a password",
        "duplicate_member": "two members with one name, or names that differ by case only",
        "too_many_files": "more members than allowed",
        "too_large": "more bytes than allowed, in one file or in all",
        "ratio": "a member that grows too much when unpacked",
        # the files
        "missing_file": "a file that an adapter needs",
        "extra_file": "a file that is no part of an adapter",
        "pickle": "a pickled file, which could run code",
        "unsafe_path": "a link, device or path outside the folder",
        "unreadable": "a file that cannot be read",
        # adapter_config.json
        "bad_json": "not JSON, or not an object",
        "duplicate_key": "a key given twice",
        "unknown_key": "a key that PEFT's LoRA config does not have",
        "bad_value": "a value of the wrong type or out of range",
        "peft_type": "another kind of adapter than LORA",
        "unsupported": "a feature that is not built here",
        "bad_pattern": "a regular expression that is none, or that could take for ever",
        "dead_pattern": "a key of rank_pattern or alpha_pattern that decides for no module",
        "version": "a mixture written by another loramux",
        # adapter_model.safetensors
        "corrupt": "not an intact safetensors file",
        "header_too_large": "a safetensors header over the limit",
        "too_many_tensors": "more tensors than allowed",
        "dtype": "numbers of a kind that is not allowed",
        "nonfinite": "NaN or infinite values",
        "duplicate_tensor": "tensor names that differ by case or Unicode form only",
        "wrong_prefix": "tensor names without PEFT's prefix",
        "unexpected_tensor": "a tensor that nobody would use",
        "missing_tensor": "A without B, B without A, or no magnitude where use_dora is true",
        "missing_module": "a module of target_modules that has no tensors",
        "unknown_module": "a module that is no linear of the base's decoder layers",
        "shape": "a tensor that does not fit its linear",
        "transposed": "A or B the wrong way round",
        "rank": "ranks of tensors and config that differ",
        "rank_limit": "a rank over the limit",
        "no_op": "an adapter that changes nothing",
        "norm": "an update far larger than the weights it is added to",
        "base_mismatch": "an adapter of another base",
        # mixtures
        "mixture": "a mixture where a single adapter is expected",
        "bad_name": "a name of an expert that is not allowed, or given twice",
        "digest": "a part that was changed after the mixture was saved",
        "method": "a method that this loramux does not have",
        "bad_mixture": "settings, experts or router tensors that do not belong together",
        "format": "another fault of the files",
    }
)


class UploadError(LoramuxError):
    """An upload that is refused: what was found, what is allowed, what to do; `code` is one of CODES.

    Messages quote what came in, at times by way of other people's parsers: control codes are escaped.
    """

    def __init__(self, message: str, *, code: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
        assert code in CODES, f"{code!r} is not in CODES"
        self.code = code
