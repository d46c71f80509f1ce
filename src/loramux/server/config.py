"""What a server may be told: one YAML, every key, its type, its default and its limits.

Why strict: a misspelt limit that is silently ignored is no limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from loramux.errors import LoramuxError, RecipeError
from loramux.recipe.load import override, placed, read_mapping
from loramux.recipe.problems import validated

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServerConfigError(LoramuxError):
    """A server's YAML, or a value set over it, is not valid."""

    code = "bad_config"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RegistryConfig(_Strict):
    """Where adapters are kept; without any of it, where `loramux registry` keeps them."""

    root: str | None = Field(None, description="folder of the database and of the blobs")
    url: str | None = Field(
        None, description="database instead of SQLite: postgresql+psycopg://..."
    )
    blobs: str | None = Field(None, description="folder or fsspec URL of the blobs")


class EngineConfig(_Strict):
    """Handed to the engine as they are; its documentation says what they mean."""

    dtype: str | None = None
    kv_memory: int | str = "512MiB"
    adapter_memory: int | str = "2GiB"
    slot_memory: int | str = "1GiB"
    max_slots: int = Field(1024, ge=1)
    max_batch: int = Field(64, ge=1)
    max_step_tokens: int = Field(2048, ge=1)
    max_chunk: int = Field(512, ge=1)
    max_prompt_tokens: int | None = Field(
        256, ge=1, description="null for no limit, as in an engine of its own; raise it on a GPU"
    )
    max_pauses: int = Field(8, ge=0, description="0 in an engine of its own; here tenants meet")
    head_start: int = Field(2048, ge=0)
    prefix_cache: bool = True
    threads: int | None = Field(None, ge=1, description="of torch; all cores without it")


class LimitsConfig(_Strict):
    """Caps of one request and of all that wait; what exceeds them is refused, never cut."""

    max_inflight: int = Field(512, ge=1, description="inference requests that run or wait")
    max_inflight_per_tenant: int | None = Field(None, ge=1, description="a quarter without it")
    max_adapters: int = Field(4096, ge=1, description="adapters the engine knows at once")
    max_names: int = Field(65536, ge=1, description="resolved names kept in memory")
    max_n: int = Field(16, ge=1)
    max_prompts: int = Field(256, ge=1, description="prompts in one /v1/completions call")
    max_mix: int = Field(8, ge=1, description="adapters in one weighted mix")
    max_stop: int = Field(16, ge=0)
    max_stop_chars: int = Field(256, ge=1)
    max_logprobs: int = Field(20, ge=0)
    max_messages: int = Field(1024, ge=1)
    max_prompt_chars: int = Field(1_000_000, ge=1, description="of all texts of a call")
    max_tokens: int = Field(4096, ge=1, description="new tokens of one sample at most")
    default_max_tokens: int = Field(256, ge=1, description="where a chat request names none")
    body_bytes: int = Field(4 * 2**20, ge=1024, description="of a JSON body")
    max_connections: int = Field(2048, ge=1, description="open connections; more are turned away")
    read_timeout_s: float = Field(
        20.0, gt=0, description="silence within a body before it is refused"
    )
    head_timeout_s: float = Field(
        10.0, gt=0, description="until a request's head is whole, from the answer before it"
    )
    request_timeout_s: float = Field(600.0, gt=0)
    write_timeout_s: float = Field(20.0, gt=0, description="a reader slower than this is cut off")
    heartbeat_s: float = Field(
        10.0, gt=0, description="silence in a stream before a comment is sent"
    )
    grace_s: float = Field(
        30.0, ge=0, description="calls under way may go on for so long when the server is stopped"
    )


class TenantsConfig(_Strict):
    """Without `enabled` there are no keys: one user, `local`, on this machine only."""

    enabled: bool = False
    url: str | None = Field(None, description="database of tenants; the registry's without it")


class RetrievalConfig(_Strict):
    """How `auto` and `router:` find adapters."""

    enabled: bool = True
    encoder: Literal["auto", "minilm", "none"] = Field(
        "auto", description="auto: MiniLM where it is installed, else words alone"
    )
    k: int = Field(3, ge=1, le=64, description="hits shown, and mixed where `mode` says so")
    mode: Literal["selection", "mixture"] = "selection"
    threshold: float | Literal["calibrated"] | None = Field(
        "calibrated",
        description="least lexical score of the best, or the base answers; null: none; calibrated: by the profiles",
    )
    false_abstain: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="share of prompts that `calibrated` may leave to the base wrongly",
    )
    trusted_tenants: tuple[str, ...] | None = Field(
        None,
        description="whose shared adapters `auto` may choose beside the caller's own; null: all that share",
    )
    qdrant_url: str | None = None
    qdrant_collection: str = Field("loramux", min_length=1, description="of this registry alone")
    ramole_router: str | None = Field(None, description="folder of a trained RAMoLE router")


class UploadsConfig(_Strict):
    """Caps of one upload; what a tenant may hold in all is its quota."""

    max_bytes: int = Field(512 * 2**20, ge=1024)
    max_rank: int = Field(256, ge=1)
    lora_path_roots: tuple[str, ...] = Field(
        (), description="folders that /v1/load_lora_adapter may read; none without it"
    )


class ReceiptsConfig(_Strict):
    """Signed statements of which weights answered."""

    enabled: bool = True


class MetricsConfig(_Strict):
    """Prometheus metrics."""

    enabled: bool = True
    top_adapters: int = Field(50, ge=0, description="adapters with a label of their own")
    public: bool = Field(
        False, description="serve /metrics without a key too; it shows totals then, and no names"
    )
    operators: tuple[str, ...] = Field(
        (), description="tenants whose admin keys see everybody's names at /metrics"
    )
    tracing: bool = Field(False, description="OpenTelemetry; needs the extra `otel`")


class ServerConfig(_Strict):
    """All of it; `base` is the only key that must be there."""

    base: str = Field(min_length=1, description="folder, hub id, or a name `loramux fetch` knows")
    model_name: str | None = Field(
        None, description="what clients call the base; from `base` without it"
    )
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    data: str | None = Field(
        None, description="folder of the signing key; beside the registry without it"
    )
    registry: RegistryConfig = RegistryConfig()
    tenants: TenantsConfig = TenantsConfig()
    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    uploads: UploadsConfig = UploadsConfig()
    receipts: ReceiptsConfig = ReceiptsConfig()
    metrics: MetricsConfig = MetricsConfig()

    @property
    def name(self) -> str:
        """What clients call the base."""
        return self.model_name or Path(self.base).name or self.base


def parse_config(raw: Mapping[str, Any]) -> ServerConfig:
    """Check a configuration that is already a mapping; every problem is named at once."""
    try:
        config = validated(ServerConfig, raw, "")
    except RecipeError as error:
        raise ServerConfigError(str(error)) from None
    check_exposure(config)
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ServerConfig:
    """Read, override and check; relative folders are taken from the file's folder."""
    path = Path(path)
    try:
        raw = read_mapping(path, "base, host, port, registry and tenants")
        for text in overrides:
            raw = override(raw, text)
    except RecipeError as error:
        raise ServerConfigError(str(error)) from None
    try:
        raw = _with_paths_from(raw, path.parent.resolve())
    except (OSError, RuntimeError) as error:  # a name of 5,000 letters, the home of nobody
        why = getattr(error, "strerror", None) or error
        raise ServerConfigError(f"{path}: a folder that it names cannot be: {why}") from None
    try:
        return parse_config(raw)
    except ServerConfigError as error:
        raise ServerConfigError(f"{path}: {error}") from None


def check_exposure(config: ServerConfig) -> None:
    """A server without keys serves whoever reaches it, so it listens on this machine only."""
    if not config.tenants.enabled and config.host not in LOOPBACK:
        raise ServerConfigError(
            f"host {config.host!r} without keys would serve everybody who reaches it; a server without keys listens "
            f"on {LOOPBACK[0]} only: set tenants.enabled=true and create a key, or leave host out"
        )


def _with_paths_from(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy whose relative folders start at the file's."""
    result = dict(raw)
    if isinstance(result.get("base"), str):
        result["base"] = placed(result["base"], folder, is_path=False)
    for section, key in (("registry", "root"), ("retrieval", "ramole_router")):
        inner = result.get(section)
        if isinstance(inner, dict) and isinstance(inner.get(key), str):
            result[section] = {**inner, key: str(folder / Path(inner[key]).expanduser())}
    if isinstance(result.get("data"), str):
        result["data"] = str(folder / Path(result["data"]).expanduser())
    uploads = result.get("uploads")
    if isinstance(uploads, dict) and isinstance(uploads.get("lora_path_roots"), list):
        roots = [
            str(folder / Path(root).expanduser()) if isinstance(root, str) else root
            for root in uploads["lora_path_roots"]
        ]
        result["uploads"] = {**uploads, "lora_path_roots": roots}
    return result
