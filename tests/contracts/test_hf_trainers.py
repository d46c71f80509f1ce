"""An attached model trains unchanged under other people's loops, and all of them see the same losses as ours.

Why 50 steps: a router loss that is scaled wrongly, or does not reach the gradient at all, shows after a few updates.
All loops get the same ready-made micro-batches; what is compared is the loss of every step, router loss included.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import loramux
from loramux.data import Example, collate
from loramux.train import Job, Listener, StepEvent, Trainer, TrainingConfig
from loramux.train.hf import RouterCallback
from pico import PAD, build_pico
from train.toys import examples

STEPS, SIZE, LR = 50, 2, 5e-3
METHODS = {
    "milora": loramux.MiLoRAConfig(r=4, router_aux_loss_coef=0.1),
    "mixlora": loramux.MixLoRAConfig(
        r=4, num_experts=4, lora_dropout=0.0, router_aux_loss_coef=0.1, router_init_range=0.5
    ),
}
# A router loss that outweighs the answers: one that is lost or counted twice shows in the first step.
LOUD = {
    "loud milora": loramux.MiLoRAConfig(r=4, router_aux_loss_coef=5.0),
    "loud mixlora": loramux.MixLoRAConfig(
        r=4, num_experts=4, lora_dropout=0.0, router_aux_loss_coef=5.0, router_init_range=0.5
    ),
}
Loop = Callable[..., list[float]]


def attached(method: str) -> tuple[PreTrainedModel, loramux.Handle]:
    model = build_pico("llama")
    torch.manual_seed(0)
    return model, loramux.attach(model, (METHODS | LOUD)[method])


def job(accumulation: int) -> Job:
    return Job(
        "default",
        train=examples(64),
        training=TrainingConfig(
            steps=STEPS,
            learning_rate=LR,
            micro_batch_size=SIZE,
            gradient_accumulation_steps=accumulation,
            scheduler="constant",
            warmup_ratio=0.0,
        ),
        pad_token_id=PAD,
    )


def micro_batches(accumulation: int) -> list[list[Example]]:
    asked = job(accumulation)
    return [[asked.train[i] for i in part] for part in asked.plan()]


class Losses(Listener):
    def __init__(self) -> None:
        self.values: list[float] = []

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        self.values.append(event.loss + event.aux)


@cache
def our_loop(method: str, accumulation: int) -> list[float]:
    model, handle = attached(method)
    losses = Losses()
    Trainer(model, handle, [job(accumulation)], listeners=[losses]).run()
    return losses.values


def bare_loop(method: str, accumulation: int, _: Any, __: Path) -> list[float]:
    """What a user writes: outputs.loss, nothing of ours but the attached model."""
    model, handle = attached(method)
    model.train()
    parameters = list(handle.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    parts = [collate(part, PAD) for part in micro_batches(accumulation)]
    losses = []
    for start in range(0, len(parts), accumulation):
        step = parts[start : start + accumulation]
        total = sum((batch["labels"] != -100).sum() for batch in step)
        extra = {"num_items_in_batch": total} if accumulation > 1 else {}
        found = []
        for batch in step:
            loss = model(**batch, **extra).loss
            loss.backward()
            found.append(loss.item())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(found))
    return losses


class Recorded(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])


def arguments(accumulation: int, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": SIZE,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def rows(accumulation: int) -> list[dict[str, list[int]]]:
    return [
        {
            "input_ids": list(example.input_ids),
            "labels": [
                token if supervised else -100
                for token, supervised in zip(example.input_ids, example.loss_mask, strict=True)
            ],
        }
        for part in micro_batches(accumulation)
        for example in part
    ]


def pad(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A plain collator without a prompt mask: prompt routers then read what precedes the first label."""
    made = [
        Example.build("", row["input_ids"], [label != -100 for label in row["labels"]])
        for row in features
    ]
    batch = collate(made, PAD)
    batch.pop("prompt_mask")
    return batch


def hf_trainer(method: str, accumulation: int, _: Any, folder: Path) -> list[float]:
    model, _handle = attached(method)
    recorded = Recorded()
    transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments(accumulation, folder)),
        train_dataset=rows(accumulation),  # type: ignore[arg-type]
        data_collator=pad,
        callbacks=[recorded],
    ).train()
    return recorded.values


def sft_trainer(
    method: str, accumulation: int, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> list[float]:
    import datasets
    import trl

    model, _handle = attached(method)
    recorded = Recorded()
    config = trl.SFTConfig(
        **arguments(accumulation, folder),
        bf16=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows(accumulation)),
        data_collator=pad,
        processing_class=tokenizer,
        callbacks=[recorded],
    ).train()
    return recorded.values


LOOPS: dict[str, Loop] = {
    "bare loop": bare_loop,
    "transformers.Trainer": hf_trainer,
    "trl.SFTTrainer": sft_trainer,
}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", LOOPS)
def test_fifty_steps_have_the_losses_of_our_trainer(
    loop: str,
    method: str,
    accumulation: int,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    ours = our_loop(method, accumulation)
    theirs = LOOPS[loop](method, accumulation, tokenizer, tmp_path)
    assert len(theirs) == STEPS
    assert ours[-1] < ours[0] - 0.5, "nothing was learnt, so equal losses would prove nothing"
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", LOUD)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_router_loss_that_outweighs_the_answers_reaches_every_trainer(
    loop: str, method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ours = our_loop(method, 1)
    theirs = LOOPS[loop](method, 1, tokenizer, tmp_path)
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=1e-5, atol=0)


def test_the_losses_are_those_of_the_router_too() -> None:
    """Without the router loss the same fifty steps go elsewhere: equality above is not blind to it."""
    with_loss = our_loop("mixlora", 1)
    model = build_pico("llama")
    torch.manual_seed(0)
    config = loramux.MixLoRAConfig(
        r=4, num_experts=4, lora_dropout=0.0, router_aux_loss_coef=0.0, router_init_range=0.5
    )
    losses = Losses()
    Trainer(model, loramux.attach(model, config), [job(1)], listeners=[losses]).run()
    gap = [abs(a - b) for a, b in zip(with_loss, losses.values, strict=True)]
    assert max(gap) > 1e-2


def test_the_callback_refuses_to_load_the_best_model_at_the_end(tmp_path: Path) -> None:
    model, handle = attached("milora")
    changes = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    args = arguments(1, tmp_path) | changes | {"eval_steps": 1, "save_steps": 1}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**args),
        train_dataset=rows(1),  # type: ignore[arg-type]
        eval_dataset=rows(1),  # type: ignore[arg-type]
        data_collator=pad,
        callbacks=[RouterCallback(handle)],
    )
    with pytest.raises(ValueError, match=r"load_best_model_at_end.*`loramux train`"):
        trainer.train()


def test_the_callback_logs_the_routing_and_saves_an_adapter_that_loads(tmp_path: Path) -> None:
    model, handle = attached("mixlora")
    args = arguments(1, tmp_path) | {"max_steps": 3}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**args),
        train_dataset=rows(1),  # type: ignore[arg-type]
        data_collator=pad,
        callbacks=[RouterCallback(handle, tensorboard=tmp_path / "board")],
    )
    trainer.train()
    row = trainer.state.log_history[0]
    assert 0 < row["router/default/entropy"] <= 1
    shares = [value for key, value in row.items() if key.startswith("router/default/01/")]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(1)
    assert list((tmp_path / "board").glob("events.*"))
    batch = collate(examples(4), PAD)
    want = model.eval()(**batch).logits
    other = build_pico("llama")
    # The trainer switches config.use_cache off, and a base without a folder is known by its config.
    loramux.load(other, tmp_path / "adapter", name="default", check_base=False)
    torch.testing.assert_close(other(**batch).logits, want)
