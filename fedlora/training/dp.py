"""DP-SGD for a cohort, on Opacus: per-example gradients by its grad samplers, clipping and noise by its optimiser.

The unit of privacy is one example of one client, or one person with its examples there. Each client has its own sum of
clipped gradients, its own noise, drawn from its own generator, and its own divisor; so a client's result does not
depend on which clients share the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from fedlora import entropy
from fedlora.adapters import AdaptedModel, RowLayout
from fedlora.adapters.stacked import RowProducts, StackedLayer
from fedlora.errors import GuardError
from fedlora.training.unit_sums import UnitBatch

NOISE_STEPS, NOISE_NUMBERS = 8, 2**18
"""So many steps' noise of a client is drawn at once, and so many numbers; both the same whatever the cohort."""


class _Tap(torch.autograd.Function):
    """Hands a layer's output on. On its way back, the gradient leaves the layer's per-example gradients behind."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, layer: StackedLayer, *inputs: torch.Tensor) -> torch.Tensor:
        # Saved as autograd saves activations: gradient checkpointing drops them and computes them again.
        ctx.save_for_backward(*inputs)
        ctx.layer = layer
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = [x.detach() for x in ctx.saved_tensors]  # what samplers keep of them must not keep the graph
        _take_samples(ctx.layer, inputs, gradients[0])
        return gradients[0], None, *(None for _ in inputs)


def _take_samples(layer: Any, inputs: list[torch.Tensor], gradient: torch.Tensor) -> None:
    """Add a layer's per-example gradients, by its grad sampler, to those of its parameters."""
    for parameter, sample in GradSampleHooks.GRAD_SAMPLERS[type(layer)](layer, inputs, gradient).items():
        before = parameter.grad_sample
        # Added by broadcasting, one row's gradient would be every example's.
        if before is not None and len(before) != len(sample):
            raise GuardError(f"{layer.name} has gradients of {len(before)} rows, then of {len(sample)}")
        parameter.grad_sample = sample if before is None else before + sample


def _tap(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
    """Tap a layer's output, as a forward hook."""
    if not (layer.training and torch.is_grad_enabled()):
        return None
    tapped: torch.Tensor = _Tap.apply(output, layer, *inputs)
    return tapped


def forget_batch(adapted: AdaptedModel) -> None:
    """Drop the per-example gradients that an unfinished pass left behind."""
    for p in _sampled(adapted):
        p.grad_sample = None


def _layers(adapted: AdaptedModel) -> list[StackedLayer]:
    return [layer for layer in adapted.model.modules() if isinstance(layer, StackedLayer)]


def _sampled(adapted: AdaptedModel) -> list[Any]:
    """Return the parameters that have, or get, per-example gradients."""
    return [p for layer in _layers(adapted) for p in layer.parameters() if p.requires_grad]


def choose_ghost_norms(
    adapted: AdaptedModel, names: Iterable[str], tokens: int, units: bool = False
) -> dict[str, bool]:
    """Choose, for every trained weight, between per-example gradients and ghost norms, whichever costs less.

    Parameters
    ----------
    adapted : AdaptedModel
    names : iterable of str
        Of the trained arrays; biases have no choice.
    tokens : int
        Of the longest row; the choice must be the same in every batch and cohort of a run.
    units : bool
        Whether the gradients of several rows are added up before they are clipped: then none are ghost norms.

    Returns
    -------
    dict of str to bool
        True where ghost norms are taken, by name of the weight.
    """
    chosen, layers = {}, adapted.stacked_layers()
    for name in names:
        if name not in layers:
            continue
        layer = layers[name]
        length = 1 if name.rpartition(".")[0] in adapted.head else tokens
        layer.ghost = not units and layer.ghost_norms_pay(length)
        chosen[name] = layer.ghost
    return chosen


@contextmanager
def per_example_gradients(adapted: AdaptedModel) -> Iterator[None]:
    """Let every trained parameter receive ``grad_sample`` [N, ...] in the backward pass, and clean up afterwards.

    The layers' grad samplers are those that are registered with Opacus. The loss has to be a sum of the rows'.

    Notes
    -----
    Opacus' own hooks, before and behind each layer, would do the same at more of the host's time.
    """
    forget_batch(adapted)
    layers = [layer for layer in _layers(adapted) if any(p.requires_grad for p in layer.parameters(recurse=False))]
    hooks = [layer.register_forward_hook(_tap) for layer in layers]
    adapted.layout.per_example = True
    try:
        yield
    finally:
        adapted.layout.per_example = False
        for hook in hooks:
            hook.remove()
        for p in _sampled(adapted):
            if hasattr(p, "grad_sample"):
                del p.grad_sample


def check_grad_samples(adapted: AdaptedModel, rows: int) -> None:
    """Guard against training that does not happen: stale parameters, or hooks set before the model moved.

    Raises
    ------
    GuardError
        Naming a trainable that has no per-example gradient of ``rows`` rows.
    """
    for name in adapted.trained:
        sample = getattr(adapted.parameter(name), "grad_sample", None)
        if sample is None or len(sample) != rows:
            got = "none" if sample is None else f"{len(sample)} rows"
            raise GuardError(f"{name} has no per-example gradient for the batch's {rows} rows (it has {got})")


def _norms(sample: torch.Tensor | RowProducts) -> torch.Tensor:
    if isinstance(sample, RowProducts):
        return sample.norms()
    return torch.linalg.vector_norm(sample.flatten(1), dim=1)


class StackedDPOptimizer(DPOptimizer):
    """Opacus' DPOptimizer for parameters with a client axis.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Over parameters [K, ...] whose ``grad_sample`` is [N, ...].
    noise_multipliers : sequence of K floats
        sigma of each client.
    max_grad_norm : float
        C.
    expected_batch_sizes : sequence of K floats
        What each client's noised sum is divided by.
    generators : sequence of K torch.Generator or None
        Where each client's noise comes from; None for the operating system's entropy (:mod:`fedlora.entropy`).
    layout : RowLayout
        Which rows are whose.
    after_noise : callable, optional
        Called in every step once the gradients are noised and scaled.

    Attributes
    ----------
    idle : list of Parameter
        Those that the step under way leaves out: of an example's norm, of what is noised, and of what moves.
    units : UnitBatch or None
        Which rows of the physical batch are of one unit, where units are clipped and not rows.

    Notes
    -----
    Client k's gradient is (sum of its rows times min(1, C / (norm + 1e-6)) + sigma_k C noise_k) / E_k, with the norm
    taken over all trained parameters together, as in Opacus. With units the mean of a unit's rows is in a row's place.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multipliers: Sequence[float],
        max_grad_norm: float,
        expected_batch_sizes: Sequence[float],
        generators: Sequence[torch.Generator | None],
        layout: RowLayout,
        after_noise: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=max(noise_multipliers),
            max_grad_norm=max_grad_norm,
            expected_batch_size=1,
            loss_reduction="mean",
        )
        self.noise_multipliers = list(noise_multipliers)
        self.expected_batch_sizes = list(expected_batch_sizes)
        self.generators = list(generators)
        self.layout, self.after_noise = layout, after_noise
        self.idle: list[torch.nn.Parameter] = []
        self.units: UnitBatch | None = None
        self._carried: dict[int, torch.Tensor] = {}
        self._noise = torch.empty(0)

    def clip_and_accumulate(self) -> None:
        """Clip every row, or unit, over all parameters and add it to its client's sum; an empty batch adds nothing."""
        idle = set(map(id, self.idle))
        params = [p for p in self.params if getattr(p, "grad_sample", None) is not None and id(p) not in idle]
        if not params:
            return
        samples, layout = [p.grad_sample for p in params], self.layout
        if self.units is not None and len(samples[0]):
            samples, layout = self._by_unit(params, self.units), self.units.clients
        # A split model's norms and factors meet on the first parameter's device.
        norms = torch.stack([_norms(sample).to(params[0].device) for sample in samples]).norm(dim=0)
        # A gradient that overflowed is left out: the NaN that it would make of the sum tells that its example is there.
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0).nan_to_num(0.0)
        if self.units is not None and layout is self.units.clients:
            factors = self.units.known(factors)
        for p, sample in zip(params, samples, strict=True):
            weights = factors.to(p)
            if isinstance(sample, RowProducts):
                sample = RowProducts(*(x.nan_to_num(0.0, 0.0, 0.0) for x in (sample.g, sample.x)))
                summed = sample.sum_rows(layout, weights)
            else:
                summed = layout.sum_rows(sample.nan_to_num_(0.0, 0.0, 0.0), weights)
            p.summed_grad = summed if p.summed_grad is None else p.summed_grad + summed

    def _by_unit(self, params: list[Any], units: UnitBatch) -> list[torch.Tensor]:
        """Add up the rows of each unit; keep of a unit that goes on what is to be added in the next physical batch."""
        found = []
        for p in params:
            summed, self._carried[id(p)] = units.sums(p.grad_sample, self._carried.get(id(p)))
            found.append(summed)
        return found

    def add_noise(self) -> None:
        """Add each client's noise, from its own generator, whether or not it had a row."""
        params = self.params
        sizes = [p[0].numel() for p in params]
        if not len(self._noise):
            self._noise = self._draw_noise(sum(sizes))
        # Noise is drawn for all parameters, whatever a step trains: what is left over is thrown away.
        noise, self._noise = self._noise[0], self._noise[1:]
        idle = set(map(id, self.idle))
        for p, part in zip(params, noise.split(sizes, 1), strict=True):
            if id(p) in idle:
                p.grad = None
                continue
            part = part.to(p.device).reshape(p.shape)
            p.grad = part.clone() if p.summed_grad is None else p.summed_grad + part

    def _draw_noise(self, size: int) -> torch.Tensor:
        """Draw several steps' noise, [steps, K, size]: a launch a client and step would cost more than the noise."""
        first = self.params[0]
        device = next((g.device for g in self.generators if g is not None), first.device)
        steps = max(1, min(NOISE_STEPS, NOISE_NUMBERS // size))
        noise = torch.zeros(len(self.generators), steps, size, dtype=first.dtype, device=device)
        for block, sigma, generator in zip(noise, self.noise_multipliers, self.generators, strict=True):
            if sigma and generator is None:
                entropy.fill_normal(block)
                block *= sigma * self.max_grad_norm
            elif sigma:
                block.normal_(0, sigma * self.max_grad_norm, generator=generator)
        return noise.transpose(0, 1)

    def scale_grad(self) -> None:
        """Divide each client's noised sum by its expected batch size."""
        made = torch.tensor(self.expected_batch_sizes, dtype=self.params[0].dtype)
        on = {d: made.to(d, non_blocking=True) for d in {p.device for p in self.params}}
        for p in self.params:
            if p.grad is None:
                continue
            p.grad /= on[p.device].reshape(-1, *(1,) * (p.dim() - 1))

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """As in Opacus, but a cohort of empty Poisson batches, without per-example gradients, still gets its noise."""
        self.clip_and_accumulate()
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        self.add_noise()
        self.scale_grad()
        self.after_noise()
        self._is_last_step_skipped = False
        return True
