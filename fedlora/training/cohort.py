"""Local training of a cohort: K clients that share the frozen base model, in one pass.

Every client has its own adapters, examples, random generators, noise and steps; the result of each equals that of
training it alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.config import ClientSection, Config
from fedlora.data.packing import packed_batch, packed_rows
from fedlora.data.tokens import TokenTable
from fedlora.errors import GuardError
from fedlora.privacy import PrivacyPlan
from fedlora.privacy.calibration import local_steps
from fedlora.roles import kind_of
from fedlora.timeline import phase
from fedlora.training.batches import poisson_batches, shuffled_batches, unit_batches
from fedlora.training.checkpointing import dropout_states, set_dropout_states
from fedlora.training.dp import (
    StackedDPOptimizer,
    check_grad_samples,
    choose_ghost_norms,
    forget_batch,
    per_example_gradients,
)
from fedlora.training.local_terms import add_local_terms
from fedlora.training.optimizer_state import put_states, take_states
from fedlora.training.rule import StepRule
from fedlora.training.soundness import check_packing, check_sound, dependence
from fedlora.training.step_memory import StepMemory, step_memory
from fedlora.training.unit_sums import UnitBatch

log = logging.getLogger("fedlora")


@dataclass(frozen=True)
class ClientJob:
    """One client's training in one exchange of a round.

    Attributes
    ----------
    client : int
        Partition number.
    server_round : int
    rows : ndarray of int
        Its examples in the token table.
    arrays : dict of str to Tensor
        What it starts from and trains.
    learning_rate : float
    plan : PrivacyPlan or None
        Its DP-SGD, if any.
    secret : bool
        Draw noise, sampling and dropout from the operating system's entropy instead of the run's seed; for real nodes,
        whose noise nobody else may be able to compute.
    on_step : callable, optional
        Called before each step reads an example; a real node charges its ledger there.
    exchange : int
        Number of the exchange in its round, from 1.
    state : dict of str to Tensor
        What its optimiser remembers of earlier rounds (:mod:`fedlora.training.optimizer_state`).
    shift : dict of str to Tensor
        What is added to each of its gradients, after clipping and noise (:mod:`fedlora.corrections`).
    attempt : int
        How often the round was repeated; its noise and batches are drawn anew.
    """

    client: int
    server_round: int
    rows: np.ndarray
    arrays: Arrays
    learning_rate: float
    plan: PrivacyPlan | None = None
    secret: bool = False
    on_step: Callable[[], None] | None = None
    exchange: int = 1
    state: Arrays = field(default_factory=dict)
    shift: Arrays = field(default_factory=dict)
    attempt: int = 0


@dataclass(frozen=True)
class ClientResult:
    """What one client's training gave.

    Attributes
    ----------
    arrays : dict of str to Tensor
        Trained, on the CPU.
    steps : int
    examples : int
        n, all examples that the client holds; or units, where its steps draw these.
    loss : float
        Mean over the examples that it trained on, in nats; nan where there was none.
    state : dict of str to Tensor
        What its optimiser remembers, if the config says that it is kept.
    learning_rate : float
        Of its steps.
    trained_steps : dict of str to int
        How many of the steps trained each array.
    """

    arrays: Arrays
    steps: int
    examples: int
    loss: float
    state: Arrays = field(default_factory=dict)
    learning_rate: float = 0.0
    trained_steps: dict[str, int] = field(default_factory=dict)


def learning_rate(client: ClientSection, base: float, server_round: int, rounds: int) -> float:
    """Learning rate of a whole round: linear warm-up, then constant, linear to zero or half a cosine."""
    if server_round <= client.warmup_rounds:
        return base * server_round / (client.warmup_rounds + 1)
    progress = (server_round - 1 - client.warmup_rounds) / max(1, rounds - client.warmup_rounds)
    if client.lr_scheduler == "linear":
        return base * (1 - progress)
    if client.lr_scheduler == "cosine":
        return float(base * 0.5 * (1 + np.cos(np.pi * progress)))
    return base


def train_cohort(
    adapted: AdaptedModel, table: TokenTable, jobs: Sequence[ClientJob], config: Config, rule: StepRule | None = None
) -> list[ClientResult]:
    """Train the clients of a cohort, in one pass; one at a time if the model's examples depend on each other.

    Parameters
    ----------
    adapted : AdaptedModel
        Its frozen arrays are set; its trained ones are overwritten.
    table : TokenTable
        Holds the rows of all jobs.
    jobs : sequence of ClientJob
        All private with one clipping norm and one sort of unit, or none; all of one learning rate, from arrays of the
        same names and shapes, and of optimisers that took equally many steps.
    config : Config
    rule : StepRule, optional
        Says what each step trains.

    Returns
    -------
    list of ClientResult
        In the order of the jobs.

    Raises
    ------
    ValueError
        If the jobs differ where they may not.
    InputError
        If the jobs are private and the model's examples depend on each other, or it cannot checkpoint or pack.
    GuardError
        If the optimiser holds other parameters than the model, or a trainable has no gradient.
    """
    client, private = config.client, jobs[0].plan is not None
    _check_alike(jobs)
    if (reason := _obstacle(adapted, table, jobs, config)) is not None:
        log.warning("clients are trained one at a time, not in cohorts: %s", reason)
        return [result for job in jobs for result in train_cohort(adapted, table, [job], config, rule)]
    examples = [_drawn_from(job, table) for job in jobs]
    steps = [local_steps(config, n) for n in examples]
    last = np.array(steps)
    adapted.set_clients([job.arrays for job in jobs])
    adapted.model.train()
    named = dict(zip(adapted.trained, adapted.parameters(), strict=True))
    start = [p.detach().clone() for p in named.values()]
    optimizer = _optimizer(client, named, start, jobs)
    _check_held(optimizer, named)
    generators = [_Generators(config.run.seed, job, adapted.device) for job in jobs]
    batches = [_batches(job, table, g, client, n) for job, g, n in zip(jobs, generators, steps, strict=True)]
    results: list[ClientResult | None] = [None] * len(jobs)
    seen, taken = np.zeros(len(jobs), np.int64), np.zeros((len(named), len(jobs)), np.int64)
    with ExitStack() as stack:
        memory = stack.enter_context(step_memory(adapted, client, *expected_batch(table, jobs[0], config)))
        if config.method.dropout:
            stack.enter_context(adapted.layout.dropout([g.dropout() for g in generators]))
        if private:
            choose_ghost_norms(adapted, adapted.trained, int(table.lengths.max()), _draws_units(jobs[0]))
            stack.enter_context(per_example_gradients(adapted))
        stepper = _Stepper(adapted, table, config, optimizer, jobs, generators, memory, rule)
        here = stack.enter_context(phase("steps", "local steps", max(steps)))
        for step in range(max(steps)):
            for job, n in zip(jobs, steps, strict=True):
                if job.on_step is not None and step < n:
                    job.on_step()
            rows = [next(b) if step < n else np.empty(0, np.int64) for b, n in zip(batches, steps, strict=True)]
            taken += np.outer(stepper.step(rows, step), step < last)
            seen += np.array([len(r) for r in rows])
            here.advance()
            # A client that is done is read now: later steps of the others move its stacked rows, not its result.
            done = np.flatnonzero(last == step + 1).tolist()
            if not done:
                continue
            losses = stepper.loss_sums.cpu().numpy()
            if stepper.unreached and seen.any() and step:
                raise GuardError(f"{min(stepper.unreached)} has no gradient in {step + 1} steps, so it is not trained")
            states = take_states(optimizer, named, done) if client.keep_optimizer_state else [{}] * len(done)
            for k, arrays, state in zip(done, adapted.trained_arrays(done), states, strict=True):
                mean, job = float(losses[k] / seen[k]) if seen[k] else float("nan"), jobs[k]
                trained = dict(zip(adapted.trained, taken[:, k].tolist(), strict=True))
                results[k] = ClientResult(arrays, steps[k], examples[k], mean, state, job.learning_rate, trained)
    return [result for result in results if result is not None]


def _obstacle(adapted: AdaptedModel, table: TokenTable, jobs: Sequence[ClientJob], config: Config) -> str | None:
    """Check that the model can be trained so; say why not in one pass, or return None where it can."""
    if jobs[0].plan is not None:
        check_sound(adapted, config, table.pad_token_id)
        return None
    if _packs(table, jobs, config):
        check_packing(adapted, config, table.pad_token_id)
    return dependence(adapted, config, table.pad_token_id) if len(jobs) > 1 else None


def _packs(table: TokenTable, jobs: Sequence[ClientJob], config: Config) -> bool:
    """Whether examples share rows. Under DP-SGD an example is a row, whatever a config says that reaches a node."""
    return config.data.packing and table.task.packs and jobs[0].plan is None


def _check_alike(jobs: Sequence[ClientJob]) -> None:
    if len({(job.learning_rate, job.plan and job.plan.max_grad_norm, _draws_units(job)) for job in jobs}) > 1:
        raise ValueError("the clients of a cohort share one learning rate, and one clipping norm and unit or none")


def _draws_units(job: ClientJob) -> bool:
    return job.plan is not None and job.plan.samples_units


def _drawn_from(job: ClientJob, table: TokenTable) -> int:
    """Return of how many examples, or units, a client's steps draw."""
    return len(np.unique(_units(job.rows, table))) if _draws_units(job) else len(job.rows)


def expected_batch(table: TokenTable, job: ClientJob, config: Config) -> tuple[int, float]:
    """Return how many examples a step of a run's clients expects, and their mean tokens.

    Where a step draws units, a mean unit's examples count for each.
    """
    each = 1
    if job.plan is not None and job.plan.samples_units and table.units is not None:
        each = min(table.rows_per_unit, job.plan.examples_per_unit or len(table))
    return config.client.batch_size * each, float(table.lengths.mean())


def _units(rows: np.ndarray, table: TokenTable) -> np.ndarray:
    if table.units is None:
        raise GuardError("the examples do not say whose they are, so that no person's can be clipped together")
    return np.asarray(table.units[rows])


class _Stepper:
    """Takes the steps of a cohort, by DP-SGD if the clients have privacy plans.

    Attributes
    ----------
    loss_sums : Tensor [K]
        Each client's losses, summed over its examples so far.
    unreached : set of str
        Trained arrays that no loss has led back to so far.
    pack_to : int or None
        Length of the rows into which several examples are put; None where each has a row of its own.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        table: TokenTable,
        config: Config,
        optimizer: torch.optim.Optimizer,
        jobs: Sequence[ClientJob],
        generators: Sequence[_Generators],
        memory: StepMemory,
        rule: StepRule | None = None,
    ) -> None:
        self._memory, self._client = memory, config.client
        self._rule = rule or StepRule()
        self._kinds = [kind_of(name, adapted.head_names) for name in adapted.trained]
        self.adapted, self.table, self.optimizer = adapted, table, optimizer
        self.loss_sums = torch.zeros(len(jobs), dtype=torch.float64, device=adapted.device)
        self._dp: StackedDPOptimizer | None = None
        self._guarded = False
        self.unreached = set(adapted.trained)
        private = [job.plan for job in jobs if job.plan is not None]
        self.pack_to = config.model.max_length if _packs(table, jobs, config) else None
        self._draws_units = _draws_units(jobs[0])
        if private:
            self._dp = StackedDPOptimizer(
                optimizer,
                noise_multipliers=[plan.noise_multiplier for plan in private],
                max_grad_norm=private[0].max_grad_norm,
                expected_batch_sizes=[plan.expected_batch_size for plan in private],
                generators=[g.noise for g in generators],
                layout=adapted.layout,
                after_noise=self._change_gradients,
            )

    @phase("step")
    def step(self, rows: list[np.ndarray], number: int) -> list[bool]:
        """Take one step on every client's batch, which is split where it exceeds the physical batch size.

        Returns
        -------
        list of bool
            Which of the trained arrays the step trained.
        """
        trains = [self._rule.trains(kind, number) for kind in self._kinds]
        idle = [p for p, trained in zip(self.adapted.parameters(), trains, strict=True) if not trained]
        if self._dp is not None:
            self._dp.idle = idle
        sizes = np.array([len(r) for r in rows])
        units = [_units(r, self.table) for r in rows] if self._draws_units else None
        if self._client.group_by_length and units is None:
            rows = [r[np.argsort(self.table.lengths[r], kind="stable")] for r in rows]
        start, longest = 0, int(sizes.max())
        while start < longest:
            size = self._memory.physical_batch_size or longest
            chunk = [r[start : start + size] for r in rows]
            if self._dp is not None and units is not None:
                self._dp.units = UnitBatch(units, start, size)
            if self._add(chunk, sizes):
                start += size
        if self._dp is None:
            named = zip(self.adapted.trained, self.adapted.parameters(), strict=True)
            self.unreached -= {name for name, p in named if p.grad is not None}
            for p in idle:
                p.grad = None
            if self._client.max_grad_norm is not None:
                _clip_by_client(self.adapted.parameters(), self._client.max_grad_norm)
            self._change_gradients()
        taken = self.optimizer if self._dp is None else self._dp
        taken.step()
        taken.zero_grad(set_to_none=True)
        return trains

    def _change_gradients(self) -> None:
        for kind, p in zip(self._kinds, self.adapted.parameters(), strict=True):
            if p.grad is not None:
                p.grad = self._rule.gradient(kind, p.grad)

    def _add(self, chunk: list[np.ndarray], sizes: np.ndarray) -> bool:
        """Add a physical batch's gradients to those of the step; False where it has to be smaller."""
        masks = dropout_states(self.adapted.layout)
        lowered: str | None = None
        try:
            loss = self._backward(chunk, sizes)
        except torch.cuda.OutOfMemoryError:
            # Of several clients fewer are tried first (fedlora.simulation.worker).
            lowered = self._memory.lower(self.adapted, len(chunk[0])) if len(chunk) == 1 else None
            if lowered is None:
                raise
        if lowered is not None:  # here nothing holds what the pass has made
            log.warning("memory ran out in a step of one client; from now on %s", lowered)
            forget_batch(self.adapted)
            set_dropout_states(masks)
            torch.cuda.empty_cache()
            return False
        if self._dp is not None:
            self._add_clipped(self._dp, chunk)
        self.loss_sums += self.adapted.layout.sum_rows(loss)
        return True

    def _backward(self, chunk: list[np.ndarray], sizes: np.ndarray) -> torch.Tensor:
        """Compute a physical batch's gradients; return each row's losses. If it fails, the step's are as before."""
        loss = _losses(self.adapted, self.table, chunk, self.pack_to)
        if self._dp is not None:
            loss.sum().backward()
            return loss.detach()
        means = np.repeat(1 / np.maximum(1, sizes), self.adapted.layout.counts)
        mean, parameters = (loss * torch.from_numpy(means).to(loss)).sum(), self.adapted.parameters()
        for p, gradient in zip(parameters, torch.autograd.grad(mean, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad + gradient
        return loss.detach()

    def _add_clipped(self, dp: StackedDPOptimizer, chunk: list[np.ndarray]) -> None:
        """Add the clipped gradients of a physical batch to those of the step; check the first batch's samples."""
        if not self._guarded:
            check_grad_samples(self.adapted, sum(map(len, chunk)))
            self._guarded = True
            self.unreached.clear()
        dp.signal_skip_step(True)
        dp.step()
        dp.zero_grad()


class _Generators:
    """A client's own sources of randomness in a round; None is the operating system's entropy, number by number."""

    def __init__(self, seed: int, job: ClientJob, device: torch.device) -> None:
        self._device = device
        self._dropout: np.random.SeedSequence | None = None
        self.noise: torch.Generator | None = None
        self.sampling: torch.Generator | None = None
        if job.secret:
            self.noise = _secret_generator(device)
        else:
            later = [job.exchange] if job.exchange > 1 or job.attempt else []
            later += [job.attempt] if job.attempt else []
            entropy = np.random.SeedSequence([seed, job.server_round, job.client, *later])
            noise, sampling, self._dropout = entropy.spawn(3)
            self.noise, self.sampling = _generator(device, noise), _generator(torch.device("cpu"), sampling)

    def dropout(self) -> torch.Generator | None:
        """Make the generator of dropout masks, which few runs need."""
        if self._dropout is None:
            return _secret_generator(self._device)
        return _generator(self._device, self._dropout)


def _secret_generator(device: torch.device) -> torch.Generator | None:
    """Return none on the CPU, whose generators are predictable; on a GPU one with a fresh key of its own."""
    return None if device.type == "cpu" else torch.Generator(device).manual_seed(int.from_bytes(os.urandom(8)) >> 1)


def _generator(device: torch.device, sequence: np.random.SeedSequence) -> torch.Generator:
    """Return a generator that starts from all of a sequence's entropy."""
    generator = torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
    if generator.device.type == "cpu":
        # On the CPU manual_seed keeps 32 bits of a seed: few enough to try them all, and for two clients to share one.
        # The state is that of a Mersenne Twister: three words of bookkeeping, then 624 words of 32 bits in 64.
        state = generator.get_state()
        words = sequence.generate_state(624, np.uint32).astype(np.int64)
        state[24 : 24 + 8 * 624] = torch.from_numpy(words).view(torch.uint8)
        generator.set_state(state)
    return generator


def _batches(
    job: ClientJob, table: TokenTable, generators: _Generators, client: ClientSection, steps: int
) -> Iterator[np.ndarray]:
    if job.plan is not None and job.plan.samples_units:
        units, most = _units(job.rows, table), job.plan.examples_per_unit
        return unit_batches(job.rows, units, job.plan.sample_rate, steps, generators.sampling, most)
    if job.plan is not None:
        return poisson_batches(job.rows, job.plan.sample_rate, steps, generators.sampling)
    assert generators.sampling is not None  # only private jobs are secret
    return shuffled_batches(job.rows, client.batch_size, steps, generators.sampling)


def _optimizer(
    client: ClientSection, named: dict[str, torch.nn.Parameter], start: list[torch.Tensor], jobs: Sequence[ClientJob]
) -> torch.optim.Optimizer:
    """Return the clients' optimiser, with what it remembers of them, and with the terms that depend on no example."""
    parameters, rate, decay = list(named.values()), jobs[0].learning_rate, client.weight_decay
    optimizer: torch.optim.Optimizer
    if client.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=client.momentum, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    put_states(optimizer, named, [job.state for job in jobs])
    shifts = [
        torch.stack([job.shift[name] for job in jobs]).to(p.device, p.dtype) if name in jobs[0].shift else None
        for name, p in named.items()
    ]
    add_local_terms(optimizer, start, client.proximal_mu, shifts)
    return optimizer


def _losses(adapted: AdaptedModel, table: TokenTable, rows: list[np.ndarray], pack_to: int | None) -> torch.Tensor:
    """Return the loss of each row of a pass: an example's, or with ``pack_to`` the sum of those that share the row."""
    # Only dropout asks for lengths.
    dropout = adapted.layout.dropout_generators is not None
    if pack_to is None:
        batch = table.batch(np.concatenate(rows), adapted.device)
        lengths = [int(table.lengths[r].max()) if len(r) else 0 for r in rows] if dropout else None
        adapted.layout.set_rows([len(r) for r in rows], lengths)
        return table.task.loss(adapted.outputs(batch, table.task), batch["labels"])
    packed = [[r[places] for places in packed_rows(table.lengths[r], pack_to)] for r in rows]
    batch = packed_batch(table, [own for client in packed for own in client])
    batch = {name: value.to(adapted.device) for name, value in batch.items()}
    lengths = [max((int(table.lengths[own].sum()) for own in client), default=0) for client in packed]
    adapted.layout.set_rows([len(client) for client in packed], lengths if dropout else None)
    task: Any = table.task
    loss: torch.Tensor = task.packed_loss(adapted.outputs(batch, task), batch["labels"], batch["weights"])
    return loss


def _clip_by_client(parameters: list[torch.nn.Parameter], max_norm: float) -> None:
    """Clip each client's own gradient norm, as ``clip_grad_norm_`` would for a client alone."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    home = parameters[0].device
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1).to(home) for g in gradients]).norm(dim=0)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g *= factors.to(g).reshape(-1, *(1,) * (g.dim() - 1))


def _check_held(optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter]) -> None:
    """Raise a GuardError unless the model's parameters are those that the optimiser steps."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in named.items():
        if id(p) not in held:
            raise GuardError(f"the optimiser holds a stale parameter in the place of {name}, so it is not trained")
