"""Why the registry said no.

Why codes: a server maps them to answers without reading messages. Nothing here names a file system path of the host.
"""

from __future__ import annotations

from loramux.errors import LoramuxError


class RegistryError(LoramuxError):
    """What was found, what is allowed and what to do; `code` is a stable short name of the reason."""

    code = "registry"

    def __init__(self, message: str, *, code: str | None = None):
        super().__init__(message)
        if code is not None:
            self.code = code


class NotFound(RegistryError):
    """No such adapter or version, or none that the caller may know of: the two are not told apart."""

    code = "model_not_found"

    @classmethod
    def of(cls, wanted: object) -> NotFound:
        """The one text for missing and for foreign."""
        return cls(
            f"the model {str(wanted)!r:.250} does not exist or you may not use it; "
            "list what you may use"
        )


class Conflict(RegistryError):
    """The registry has moved on since the caller looked, or the change would leave a loose end."""

    code = "conflict"


class Corrupt(RegistryError):
    """Stored bytes are missing or are not what was stored."""

    code = "corrupt"


class StorageError(RegistryError):
    """The disk, the database or the object store refused; nothing was changed."""

    code = "storage"


class Vanished(StorageError):
    """Somebody tidied away what was being written: the writer starts again."""

    code = "collected"

    def __init__(self) -> None:
        super().__init__(
            "what was being stored was collected again and again; collect with a longer grace time"
        )
