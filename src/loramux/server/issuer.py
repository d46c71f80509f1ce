"""From a finished call to its receipt, and where the public keys are read: `GET /v1/receipts/key`.

The receipt tells what the engine reported. If that is not what was pinned at admission, the log has an error and the
receipt shows it.

The key's folder is looked at once a second at most, and read again if it changed: a rotation reaches running servers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

from loramux.errors import LoramuxError
from loramux.server.auth import ServicesDep
from loramux.server.errors import ApiError
from loramux.server.receipts import Part, Receipt, Router, describe_answer, issue
from loramux.server.signing import Signer, mark_of

if TYPE_CHECKING:
    from loramux.engine.request import Completion
    from loramux.server.resolve import Plan
    from loramux.server.services import Outcome

log = logging.getLogger(__name__)
LOOK_S = 1.0  # between two looks at the key's folder, which are two calls of stat


def router() -> APIRouter:
    """The one route."""
    routes = APIRouter(tags=["receipts"])

    @routes.get("/v1/receipts/key", summary="Public keys of receipts")
    async def keys(services: ServicesDep) -> dict[str, Any]:
        if not isinstance(services.signer, Issuer):
            raise ApiError("this server signs no receipts", code="not_found")
        return services.signer.current().keys_json()

    return routes


class Issuer:
    """`Services.signer`: one signature per call. `base`: digest of the base, until the engine names it."""

    def __init__(
        self,
        signer: Signer,
        base: str | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.signer = signer
        self._base, self._clock = base or "", clock
        self.num_issued = self.num_mismatched = 0
        self._mark, self._looked_at = signer.mark, time.monotonic()
        self._told: object = (
            None  # what the folder was when the log was told that it cannot be read
        )

    def current(self) -> Signer:
        """The signer of the key that lies in the folder, as of the last look."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self._look()
        return self.signer

    def _look(self) -> None:
        mark = mark_of(self.signer.folder)
        if mark == self._mark:
            return
        try:
            self.signer = self.signer.again()
        except (LoramuxError, OSError) as error:
            # Tried again at every look, as the reason may pass (no file left to open); told once per change.
            if mark != self._told:
                self._told = mark
                log.error(
                    "the signing key changed and cannot be used; the old one signs on: %s", error
                )
            return
        self._mark, self._told = self.signer.mark, None
        log.info("receipts are signed with the key %s", self.signer.key_id)

    def issue(self, outcome: Outcome) -> Receipt:
        """The receipt of a call that ran, answered or not."""
        self.num_issued += 1
        plan = outcome.plan
        answers = [
            self._answer(plan, prompt, done)
            for prompt, done in zip(outcome.prompts, _by_prompt(outcome), strict=True)
        ]
        return issue(
            self.current(),
            id=outcome.id,
            tenant=outcome.caller.tenant,
            model=plan.label,
            answers=answers,
            params=outcome.params,
            debit=outcome.debit,
            now=None if self._clock is None else self._clock(),
        )

    def _answer(
        self, plan: Plan, prompt: Any, completions: tuple[Completion, ...]
    ) -> Mapping[str, Any]:
        told = {done.answered for done in completions if done.answered.base}
        pinned = tuple(plan.mix)
        for answered in told:
            if tuple((name, weight) for name, _, weight in answered.parts) != pinned:
                self.num_mismatched += 1
                log.error("what answered is not what was pinned: %s, %s", answered.parts, pinned)
        return describe_answer(
            completions,
            prompt=prompt,
            parts=_parts(plan),
            base=self._base,
            router=_router(plan),
            routing=getattr(plan, "routing", None),
        )


def _parts(plan: Plan) -> list[Part]:
    if plan.assembled is not None:  # one content in the engine, of adapters that the router names
        return [Part(plan.label, digest, weight) for digest, weight in plan.mix]
    return [
        Part(version.ref, digest, weight)
        for version, (digest, weight) in zip(plan.versions, plan.mix, strict=True)
    ]


def _router(plan: Plan) -> Router | None:
    if plan.router is None:
        return None
    found = (version.digest for version in plan.versions if version.ref == plan.router)
    members: tuple[tuple[str, str], ...] = ()
    if plan.assembled is not None:
        members = tuple((v.ref, digest) for digest, v in sorted(plan.assembled.versions.items()))
    return Router(plan.router, plan.router_digest or next(found, ""), members)


def _by_prompt(outcome: Outcome) -> tuple[tuple[Completion, ...], ...]:
    if outcome.by_prompt:
        return outcome.by_prompt
    # One prompt: all completions are its own.
    return (outcome.completions, *((),) * (len(outcome.prompts) - 1))
