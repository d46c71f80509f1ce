"""Training many adapters at once: one base forward and backward for the rows of several jobs.

JointTrainer(model, handle, jobs, out=folder).run()

Each job trains as it would alone: see `JointTrainer`, and `core/together.py` for why.
"""

from loramux.train.joint.commands import Command, Inbox
from loramux.train.joint.schedule import Candidate, RoundRobin, Scheduler
from loramux.train.joint.trainer import JointTrainer

__all__ = ["Candidate", "Command", "Inbox", "JointTrainer", "RoundRobin", "Scheduler"]
