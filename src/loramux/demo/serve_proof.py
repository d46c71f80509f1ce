"""The last steps of the serving demo: receipts are verified, one is run again, a key stops working.

Why the replay is done here and not by the server: whoever holds the registry and the base can do it.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

from loramux.demo.serve_home import ACTOR, OWNER
from loramux.demo.serve_steps import Outcome, Scene

if TYPE_CHECKING:
    from loramux.registry import Registry
    from loramux.tenancy import Tenancy

REVOKED_S = 2.0  # a second is promised; a busy machine gets another


def receipts(scene: Scene, registry: Registry) -> Outcome:
    """Every receipt so far: signature, and each adapter byte for byte in the registry; and a forged one."""
    import httpx

    from loramux.server.receipts import ReceiptError, parse, verify
    from loramux.server.replay import check_registry
    from loramux.server.signing import PublicKeys

    keys = PublicKeys.from_json(httpx.get(f"{scene.talk.url}/receipts/key").json())
    parsed = [parse(receipt) for receipt in scene.talk.receipts]
    for receipt in parsed:
        verify(receipt, keys)  # ReceiptError
    one_each = {str(part): r for r in parsed for a in r.answers for part in a["parts"]}
    checks = [check for r in one_each.values() for check in check_registry(r, registry)]
    forged = copy.deepcopy(next(r for r in scene.talk.receipts if r["answers"][0]["parts"]))
    forged["answers"][0]["parts"][0]["ref"] = "globex/other@1"
    try:
        verify(parse(forged), keys)
        told = "accepted"
    except ReceiptError as error:
        told = error.code
    kept = {check.what for check in checks if check.is_right}
    return Outcome(
        f"the receipts of {len(parsed)} replies, and one with another adapter written into it",
        f"{len(parsed)} signatures hold, {len(kept)} versions are in the registry byte for byte; forged: {told}",
        all(check.is_right for check in checks) and told == "bad_signature",
        {"receipts": len(parsed), "versions": sorted(kept)},
    )


def replay(scene: Scene, registry: Registry, base: str) -> Outcome:
    """A reply of an adapter and one of the mix, run again in an engine of this process."""
    from loramux.data.tasks import question
    from loramux.engine.engine import Engine
    from loramux.server.receipts import parse
    from loramux.server.replay import replay as run_again

    row = scene.rows["snips"][0]
    answers = [scene.talk.ask(model, row) for model in ("snips", "snips*0.7+banking*0.3")]
    checks: list[Any] = []
    with Engine(base, max_batch=4, kv_memory="64MiB") as engine:
        prompt = list(engine.tokenizer(question(row))["input_ids"])
        for answer in answers:
            checks += run_again(parse(answer.receipt), [prompt], engine, registry)
    told = ", ".join(f"{c.what.partition(': ')[2]} {_mark(c.is_right)}" for c in checks)
    return Outcome(
        f"replay of {' and '.join(answer.who for answer in answers)}",
        told,
        all(check.is_right for check in checks),
    )


def a_revoked_key(scene: Scene, tenancy: Tenancy, key_id: str) -> Outcome:
    """Revoked in another process than the server's; the next calls are refused."""
    from openai import AuthenticationError

    models = scene.talk.clients[OWNER].models
    models.list()
    tenancy.keys.revoke(key_id, actor=ACTOR)
    began, code = time.perf_counter(), None
    while code is None and time.perf_counter() - began < REVOKED_S:
        try:
            models.list()
            time.sleep(0.01)
        except AuthenticationError as error:
            code = error.code
    took = time.perf_counter() - began
    return Outcome(
        f"the key of {OWNER} is revoked",
        f"{code or 'still valid'} after {took:.2f} s",
        code == "invalid_api_key",
        {"seconds": took},
    )


def _mark(is_right: bool | None) -> str:
    return {True: "same", False: "DIFFERENT", None: "could not be told"}[is_right]
