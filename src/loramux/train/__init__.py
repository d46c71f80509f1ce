"""Training: one loop for one job or many over a shared base.

handle = loramux.attach(model, loramux.MiLoRAConfig(r=8), name="mine")
job = Job("mine", train=examples, training=TrainingConfig(steps=80))
results = Trainer(model, handle, [job]).run()

`train_recipe(recipe, out)` does all of it from a recipe. With the stock Hugging Face trainers use the attached model as
it is, and `loramux.train.hf.RouterCallback` to see its routing.
"""

from loramux.recipe import TrainingConfig
from loramux.train.checkpoint import CheckpointError
from loramux.train.events import Listener, StepEvent
from loramux.train.job import Job, JobState
from loramux.train.run import TrainingError, train_recipe
from loramux.train.trainer import JobResult, Trainer

__all__ = [
    "CheckpointError",
    "Job",
    "JobResult",
    "JobState",
    "Listener",
    "StepEvent",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
    "train_recipe",
]
