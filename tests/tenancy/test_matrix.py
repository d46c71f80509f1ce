"""Route x role x owner x state of the key, asked of the server over HTTP, against the declared policy."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux.registry import Registry
from loramux.server.app import create_app
from loramux.server.stub import StubEngine, StubTokenizer
from loramux.tenancy import POLICY, Caller, Limits, Tenancy, decide
from loramux.tenancy.policy import ALLOW, FORBIDDEN, MISSING, NO_KEY
from registry.uploads import put
from server.rig import config
from server.rig import stub_services as services_with
from tenancy.helpers import Clock

ROLES: dict[str, tuple[str, ...]] = {
    "user": ("infer",),
    "reader": ("adapters:read",),
    "writer": ("adapters:write",),
    "admin": ("admin",),
    "all": ("infer", "adapters:read", "adapters:write", "admin"),
}
STATES = (
    *("valid", "rotating", "rotated", "expired", "revoked", "disabled"),
    *("wrong", "malformed", "none"),
)
GOOD = ("valid", "rotating")
# What the adapter asked for is to the caller: its tenant, its name, whether it is shared with the caller.
OWNERS = {
    "own": ("acme", "mine", False),
    "foreign": ("globex", "hidden", False),
    "shared": ("globex", "open", True),
    "missing": ("globex", "nothing", False),
}
LIMITS = Limits.none()


@dataclass(frozen=True)
class Cell:
    method: str
    template: str
    role: str
    owner: str
    state: str

    @property
    def expected(self) -> str:
        rule = POLICY[self.method, self.template]
        tenant, _, is_shared = OWNERS[self.owner]
        caller = Caller("acme", "k", frozenset(ROLES[self.role])) if self.state in GOOD else None
        return decide(rule, caller, tenant, is_shared=is_shared)


CELLS = [
    Cell(method, template, role, owner, state)
    for (method, template), rule in POLICY.items()
    for role in ROLES
    for state in STATES
    for owner in (OWNERS if rule.touches else ["own"])
]


class World:
    """A server over a real registry and real tenants, with a stub for the engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = Registry.open(folder / "registry")
        self.wall = Clock(1_800_000_000.0)
        self.tenancy = Tenancy.open(self.registry.database, wall=self.wall)
        for name in ("acme", "globex", "gone"):
            self.tenancy.tenants.create(name, limits=LIMITS, actor="test")
        self.secrets = {(role, state): self._key(role, state) for role in ROLES for state in STATES}
        self.tenancy.tenants.disable("gone", actor="test")
        self.wall.now += 100
        self.num = 0
        self.restore()
        put(self.registry, folder, "hidden", "hidden", tenant="globex")
        put(self.registry, folder, "open", "open", tenant="globex")
        self.registry.share("globex/open", "acme", actor="test")
        services = services_with(
            engine=StubEngine(),
            tokenizer=StubTokenizer(),
            registry=self.registry,
            tenancy=self.tenancy,
        )
        limits = {"max_inflight": 10_000, "max_inflight_per_tenant": 10_000}
        self.app = create_app(config(tenants={"enabled": True}, limits=limits), services)

    def restore(self) -> None:
        """Make acme/mine, as it was before a cell deleted it."""
        self.num += 1
        self.mine = put(self.registry, self.folder, f"mine {self.num}", "mine", tenant="acme")
        self.registry.share("acme/mine", "globex", actor="test")

    def _key(self, role: str, state: str) -> str | None:
        keys, scopes = self.tenancy.keys, ROLES[role]
        if state == "none":
            return None
        if state == "malformed":
            return "sk-" + "x" * 40
        tenant = "gone" if state == "disabled" else "acme"
        expires = 50 if state == "expired" else None
        made = keys.create(tenant, scopes, expires_in_s=expires, actor="test")
        if state == "revoked":
            keys.revoke(made.key.id, actor="test")
        if state in ("rotating", "rotated"):
            keys.rotate(made.key.id, overlap_s=3600 if state == "rotating" else 50, actor="test")
        if state == "wrong":
            last = "0" if made.secret[-1] != "0" else "1"
            return made.secret[:-1] + last
        return made.secret

    async def ask(self, client: httpx.AsyncClient, cell: Cell) -> httpx.Response:
        secret = self.secrets[cell.role, cell.state]
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        path, query, body = request_of(cell)
        if cell.template.endswith("/aliases/{alias}"):
            headers["If-Match"] = "*"
            body["version"] = self.mine.version
        return await client.request(cell.method, path, params=query, headers=headers, json=body)


def request_of(cell: Cell) -> tuple[str, dict[str, str], Any]:
    """Path, query and body that name the owner's adapter."""
    tenant, name, _ = OWNERS[cell.owner]
    model = name if tenant == "acme" else f"{tenant}/{name}"
    path = cell.template.replace("{model:path}", model).replace("{name}", name)
    path = path.replace("{alias}", "stable").replace("{tenant}", "globex")
    query = (
        {}
        if tenant == "acme" or cell.method != "GET" or "{name}" not in cell.template
        else {"tenant": tenant}
    )
    bodies: dict[str, Any] = {
        "/v1/chat/completions": {
            "model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]
        },
        "/v1/completions": {"model": model, "max_tokens": 1, "prompt": "hello"},
        "/v1/embeddings": {"model": "minilm", "input": "hello"},
        "/v1/load_lora_adapter": {"lora_name": "loaded", "lora_path": f"registry:{model}"},
        "/v1/unload_lora_adapter": {"lora_name": name},
        "/v1/adapters/{name}/aliases/{alias}": {"version": 1},
        "/v1/adapters/{name}/shares": {"tenant": "globex"},
    }  # fmt: skip
    return path, query, bodies.get(cell.template)


def verdict(response: httpx.Response) -> str:
    if response.status_code == 401:
        return NO_KEY
    if response.status_code == 403:
        return FORBIDDEN
    # A 404 may also be of something that is nobody's: a server that signs no receipts has no key for them.
    is_missing = response.status_code == 404 and response.json()["error"]["code"] != "not_found"
    return MISSING if is_missing else ALLOW


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Cell, httpx.Response]]:
    """What the server said to every cell."""
    world = World(tmp_path_factory.mktemp("matrix"))

    async def ask_all() -> dict[Cell, httpx.Response]:
        transport = httpx.ASGITransport(app=world.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            found = {}
            for cell in CELLS:
                found[cell] = await world.ask(client, cell)
                if cell.method == "DELETE" and cell.owner == "own" and cell.expected == ALLOW:
                    world.restore()
            return found

    yield asyncio.run(ask_all())
    world.registry.close()


def test_there_are_two_thousand_cells():
    assert len(CELLS) >= 2000
    assert {(cell.method, cell.template) for cell in CELLS} == set(POLICY)


def test_every_cell_is_answered_as_the_policy_declares(answers):
    wrong = {
        cell: (cell.expected, response.status_code, response.text[:200])
        for cell, response in answers.items()
        if verdict(response) != cell.expected
    }
    assert not wrong, f"{len(wrong)} of {len(answers)}: {list(wrong.items())[:5]}"
    counted = Counter(cell.expected for cell in answers)
    assert min(counted[kind] for kind in (ALLOW, NO_KEY, FORBIDDEN, MISSING)) > 30


def test_no_cell_breaks_the_server_and_every_refusal_is_in_the_envelope(answers):
    for cell, response in answers.items():
        assert response.status_code < 500 or response.status_code in (501, 503), (
            cell,
            response.text,
        )
        if verdict(response) != ALLOW:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}, cell


def test_refused_keys_get_one_answer_whatever_is_wrong_with_them(answers):
    bad = [state for state in STATES if state not in (*GOOD, "none")]
    for (method, template), rule in POLICY.items():
        texts = {
            (answers[cell].status_code, answers[cell].text)
            for cell in CELLS
            if (cell.method, cell.template) == (method, template) and cell.state in bad
        }
        assert len(texts) == 1 or rule.scope == "public", (method, template, texts)


def test_foreign_names_get_the_answer_of_missing_ones(answers):
    for cell, response in answers.items():
        if cell.owner != "foreign" or cell.expected != MISSING:
            continue
        other = Cell(cell.method, cell.template, cell.role, "missing", cell.state)
        assert response.status_code == answers[other].status_code
        assert response.text.replace("hidden", "nothing") == answers[other].text, cell
        assert set(response.headers) == set(answers[other].headers)
