"""Cross-entropy a few rows at a time is torch's own, forward and backward."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from loramux.ops import cross_entropy
from loramux.ops.cross_entropy import token_losses


def made(dtype: torch.dtype, rows: int = 7, vocab: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    target = torch.randint(vocab, (rows,), generator=generator)
    weight = torch.rand(rows, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), target, weight


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
def test_losses_and_gradients_are_torchs(
    dtype: torch.dtype, tolerance: float, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target, weight = made(dtype)
    monkeypatch.setattr(cross_entropy, "CHUNK_NUMEL", rows_at_a_time * logits.shape[1])
    have = token_losses(logits, target)
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    want = functional.cross_entropy(wide, target, reduction="none")
    assert have.dtype == want.dtype
    torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(loss, logits, weight.to(loss.dtype))[0] for loss in (have, want)]
    assert grads[0].dtype == dtype
    # In bfloat16 both round the same number once; their fp32 values may sit on two sides of a boundary.
    spread = 2**-7 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(grads[0], grads[1], rtol=spread, atol=tolerance)


def test_how_many_rows_are_taken_at_a_time_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rows in (1, 4, 100):
        logits, target, _ = made(torch.bfloat16)
        monkeypatch.setattr(cross_entropy, "CHUNK_NUMEL", rows * logits.shape[1])
        losses = token_losses(logits, target)
        losses.sum().backward()
        assert logits.grad is not None
        found.append((losses, logits.grad))
    for losses, grad in found[1:]:
        assert torch.equal(losses, found[0][0])
        assert torch.equal(grad, found[0][1])


def test_no_more_than_a_chunk_of_the_logits_is_ever_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    class Widest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                self.numel = max(self.numel, out.untyped_storage().nbytes() // 4)
            return out

    logits, target, _ = made(torch.bfloat16, rows=32)
    monkeypatch.setattr(cross_entropy, "CHUNK_NUMEL", 4 * logits.shape[1])
    with Widest() as widest:
        token_losses(logits, target).sum().backward()
    assert 0 < widest.numel <= 4 * logits.shape[1]


def test_no_rows_give_no_losses_and_a_row_of_nan_stays_alone() -> None:
    logits, target, _ = made(torch.float32)
    assert token_losses(logits[:0], target[:0]).shape == (0,)
    with torch.no_grad():
        logits[2] = float("nan")
    losses = token_losses(logits, target)
    losses.sum().backward()
    assert logits.grad is not None
    for found in (losses, logits.grad.sum(1)):
        assert torch.isnan(found).nonzero().flatten().tolist() == [2]
