"""Whose answers pause for a step, so that the first token of somebody else comes sooner.

Why: prompts are served in order of fairness, but every step also carries one token of each answer under way. Where one
tenant has many of them, all others' first tokens wait for rows of that tenant. It waits instead, for so many steps in a
row at most; no token is lost and none comes out otherwise. Nobody waits for a tenant that had more than its share
already, or prompts without end would buy the steps of others.
"""

from __future__ import annotations

from loramux.engine.draft import Draft
from loramux.engine.fairness import Share, Shares

CROWD = 2  # times as many sequences, by weight, as the tenant that waits


def pause_answers(draft: Draft, shares: Shares, most: int) -> None:
    """Take out of the step the decodes of tenants who crowd one whose prompt runs in it.

    most: steps in a row that a tenant's answers pause, 0 for never; after a step that a prompt had to itself they do
    not. Blocks they were given for this step stay theirs.
    """
    may_pause = most > 0 and not draft.was_alone
    hurried = [shares[tenant] for tenant in draft.first_token_tenants] if may_pause else []
    for tenant in draft.decode_tenants:
        share = shares[tenant]
        gives_way = any(
            _crowds(share, other) and not shares.is_ahead(other, share) for other in hurried
        )
        if gives_way and share.num_paused < most:
            share.num_paused += 1
            draft.drop_decodes(tenant)
        else:
            share.num_paused = 0


def _crowds(share: Share, other: Share) -> bool:
    return share.num_running * other.weight >= CROWD * other.num_running * share.weight
