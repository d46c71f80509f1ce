"""Methods that act between steps do so under the stock Trainer as in our loop, driven by the callback."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import loramux
from contracts.test_hf_trainers import SIZE, Losses, Recorded, arguments, job, pad, rows
from loramux.data import collate
from loramux.train import Trainer
from loramux.train.hf import RouterCallback
from pico import PAD, build_pico
from train.toys import examples

CONFIG = loramux.BeamLoRAConfig(r=4, lora_dropout=0.0, interval=6, top_p=0.8)


def attached() -> tuple[Any, loramux.Handle]:
    model = build_pico("llama")
    torch.manual_seed(0)
    return model, loramux.attach(model, CONFIG)


def stock(handle: loramux.Handle, folder: Path, *callbacks: Any, **changes: Any) -> Any:
    return transformers.Trainer(
        model=handle.model,
        args=transformers.TrainingArguments(**(arguments(1, folder) | changes)),
        train_dataset=rows(1),  # type: ignore[arg-type]
        data_collator=pad,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_beamlora_makes_the_same_edits_under_the_stock_trainer(optim: str, tmp_path: Path) -> None:
    model, handle = attached()
    losses = Losses()
    ours = Trainer(model, handle, [job(1)], listeners=[losses])
    ours.run()
    edits = ours.runners[0].state.edits
    model, handle = attached()
    recorded, callback = Recorded(), RouterCallback(handle)
    stock(handle, tmp_path, recorded, callback, optim=optim).train()
    torch.testing.assert_close(
        torch.tensor(recorded.values), torch.tensor(losses.values), rtol=1e-4, atol=0
    )
    found = callback.edits["default"]
    keys = ("step", "what", "site", "pruned", "copied")
    assert len(found) > 20
    assert [[e.get(k) for k in keys] for e in found] == [[e.get(k) for k in keys] for e in edits]
    plain = build_pico("llama")
    loramux.load(plain, tmp_path / "adapter", check_base=False)
    ids = torch.tensor([[5, 17, 40, 61, 8]])
    want = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(plain(input_ids=ids).logits, want)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_epoch_is_a_pass_over_the_data_however_many_steps_are_asked_for(
    accumulation: int, tmp_path: Path
) -> None:
    """An epoch whose last accumulation is short steps on it too."""
    _, handle = attached()
    callback = RouterCallback(handle, save=False)
    changes = {"max_steps": 2, "gradient_accumulation_steps": accumulation}
    stock(handle, tmp_path, callback, **changes).train()
    (control,) = callback._controls.values()
    assert control.schedule.num_steps == 2
    batches = len(rows(1)) // SIZE
    assert control.schedule.steps_per_epoch == {1: batches, 3: -(-batches // 3)}[accumulation]


def test_alora_counts_its_rounds_in_epochs_of_the_stock_trainers_data(tmp_path: Path) -> None:
    """A twentieth of an epoch is a step or two, not a twentieth of the steps that were asked for."""
    model = build_pico("llama")
    torch.manual_seed(0)
    epoch = len(rows(1)) / SIZE
    config = loramux.ALoRAConfig(
        r=3, rounds=2, ranks_per_round=5, first_round=2 / epoch, round_every=2 / epoch,
        round_unit="epochs", score_rows=4,
    )  # fmt: skip
    handle = loramux.attach(model, config)
    held_out = examples(4, seed=5)
    callback = RouterCallback(
        handle, save=False, samples=lambda num, generator: [collate(held_out[:num], PAD)]
    )
    stock(handle, tmp_path, callback, max_steps=5).train()
    edits = callback.edits["default"]
    assert [edit["step"] for edit in edits if edit["what"] == "round"] == [2, 4]


def test_a_checkpoint_of_the_stock_trainer_is_not_gone_on_from(tmp_path: Path) -> None:
    _, handle = attached()
    callback = RouterCallback(handle)
    state = transformers.TrainerState(global_step=3, max_steps=9)
    args = transformers.TrainingArguments(**arguments(1, tmp_path))
    with pytest.raises(ValueError, match="cannot resume them.*loramux train"):
        callback.on_train_begin(args, state, transformers.TrainerControl(), optimizer=None)
