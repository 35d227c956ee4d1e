"""Local training of a cohort of clients in one pass, under DP-SGD or not, and evaluation."""

from fedlora.training.cohort import ClientJob, ClientResult, train_cohort
from fedlora.training.evaluation import evaluate, evaluate_clients
from fedlora.training.rule import StepRule

__all__ = ["ClientJob", "ClientResult", "StepRule", "evaluate", "evaluate_clients", "train_cohort"]
