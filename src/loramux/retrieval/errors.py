"""What can be wrong with a profile, a query or an index; `code` is stable, for servers."""

from __future__ import annotations

from loramux.errors import LoramuxError


class RetrievalError(LoramuxError):
    """Retrieval was asked for something it cannot do."""

    def __init__(self, message: str, code: str = "bad_retrieval") -> None:
        super().__init__(message)
        self.code = code


class ProfileError(RetrievalError):
    """Samples that make no profile, or a profile that does not belong into this index."""

    def __init__(self, message: str, code: str = "bad_profile") -> None:
        super().__init__(message, code)


class EncoderError(RetrievalError):
    """The sentence encoder is missing or is not the one it should be."""

    def __init__(self, message: str, code: str = "bad_encoder") -> None:
        super().__init__(message, code)
