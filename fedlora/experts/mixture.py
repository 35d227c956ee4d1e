"""The mixture: a public language model whose feed-forward blocks hold owners' experts, of any ranks.

Importing this module registers the architecture, so that ``AutoModelForCausalLM.from_pretrained`` loads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from fedlora.alignment import align_loaded
from fedlora.arrays import Arrays
from fedlora.errors import InputError
from fedlora.experts.expert import FULL, Expert, Rank, array_shapes
from fedlora.experts.feed_forward import ExpertShapes, FeedForward, find_feed_forwards, public_digest, replace
from fedlora.models import quiet


class MixtureConfig(PreTrainedConfig):
    """Config of a :class:`Mixture`; names follow transformers' mixtures of experts.

    Parameters
    ----------
    public : dict
        The public model's own config.
    owners : list of str
    ranks : list of int or "full"
        By owner.
    num_experts_per_tok : int, optional
        Experts that a token meets, the public one counted; all by default.
    norm_topk_prob : bool
        Divide the chosen experts' weights by their sum.
    """

    model_type = "flexmore"

    def __init__(
        self,
        public: dict[str, Any] | None = None,
        owners: Sequence[str] = (),
        ranks: Sequence[Rank] = (),
        num_experts_per_tok: int | None = None,
        norm_topk_prob: bool = True,
        **kwargs: Any,
    ) -> None:
        self.public = public or {}
        self.owners, self.ranks = list(owners), list(ranks)
        self.num_experts_per_tok, self.norm_topk_prob = num_experts_per_tok, norm_topk_prob
        for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, self.public.get(name))
        super().__init__(**kwargs)


class ExpertUpdates(nn.Module):
    """dW of one expert in one block: two factors, or a matrix, for every projection.

    Parameters
    ----------
    shapes : mapping of str to (int, int)
        Projection (gate, up, down) to (outputs m, inputs n).
    rank : int or "full"
        0 is an expert that equals the public one.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: Rank, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.rank = rank
        for role, (m, n) in shapes.items():
            sizes = {"delta": (m, n)} if rank == FULL else {"lora_A": (rank, n), "lora_B": (m, rank)}
            for factor, size in sizes.items():
                value = torch.zeros(size, dtype=dtype, device=device)
                self.register_parameter(f"{role}_{factor}", nn.Parameter(value, requires_grad=False))

    def forward(self, role: str, x: torch.Tensor) -> torch.Tensor:
        """Return dW x of a projection, for tokens x [T, n]."""
        if self.rank == FULL:
            return functional.linear(x, getattr(self, f"{role}_delta"))
        return functional.linear(functional.linear(x, getattr(self, f"{role}_lora_A")), getattr(self, f"{role}_lora_B"))


class MixtureBlock(nn.Module):
    """A feed-forward block of a public expert and any number of owners' experts.

    Parameters
    ----------
    form : FeedForward
    public : torch.nn.Module
        The model, in which nothing is replaced yet in this block.

    Attributes
    ----------
    router : Parameter [experts, d]
        Row 0 is the public expert's.
    router_bias : Parameter [experts]
        Enters as min(b, 0).

    Notes
    -----
    The public projections are computed once for all experts: gate and up since W_i x = W x + dW_i x, down since it is
    linear, sum p_i (W + dW_i) h_i = W (sum p_i h_i) + sum p_i dW_i h_i. Every expert then sees the tokens that chose
    it, at its own rank.
    """

    def __init__(self, form: FeedForward, public: nn.Module) -> None:
        super().__init__()
        self.gated = "gate" in form.projections
        self.shapes = form.shapes(public)
        for role, path in form.projections.items():
            self.add_module(role, public.get_submodule(path))
        self.activation = form.activation
        self.experts = nn.ModuleList()
        weight: torch.Tensor = self.public("up").weight  # type: ignore[assignment]
        self.router = nn.Parameter(weight.new_zeros(1, self.shapes["up"][1]), requires_grad=False)
        self.router_bias = nn.Parameter(weight.new_zeros(1), requires_grad=False)
        self.top_k: int | None = None
        self.renormalise = True

    def public(self, role: str) -> nn.Module:
        """Return the public model's layer of a projection."""
        layer: nn.Module = getattr(self, role)
        return layer

    def add(self, rank: Rank) -> ExpertUpdates:
        """Add an expert that equals the public one, and its router row, 0."""
        expert = ExpertUpdates(self.shapes, rank, self.router.dtype, self.router.device)
        self.experts.append(expert)
        zero = torch.zeros_like(self.router[:1])
        self.set_router(torch.cat([self.router, zero]), torch.cat([self.router_bias, zero[0, :1]]))
        return expert

    def remove(self, index: int) -> None:
        """Delete an expert and its router row."""
        del self.experts[index]
        kept = [i for i in range(len(self.router)) if i != index + 1]
        self.set_router(self.router[kept], self.router_bias[kept])

    def set_router(self, rows: torch.Tensor, bias: torch.Tensor) -> None:
        """Replace the router's rows [experts, d] and biases [experts]."""
        self.router = nn.Parameter(rows.detach().clone(), requires_grad=False)
        self.router_bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Return the experts' weights [T, experts] of tokens x [T, d]; 0 where an expert is not chosen."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        logits = x.to(wide) @ self.router.to(wide).T + self.router_bias.to(wide).clamp(max=0)
        weights = logits.softmax(-1)
        if self.top_k is not None and self.top_k < weights.shape[1]:
            chosen = torch.zeros_like(weights).scatter(1, weights.topk(self.top_k, 1).indices, 1.0)
            weights = weights * chosen
            if self.renormalise:
                weights = weights / weights.sum(1, keepdim=True)
        return weights

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map hidden states [..., d] to [..., d]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = self.weights(x).to(x.dtype)
        gate = self.public("gate")(x) if self.gated else None
        up = self.public("up")(x)
        mixed = weights[:, :1] * self._activate(gate, up)
        extra = torch.zeros_like(x)
        everyone = self.top_k is None or self.top_k > len(self.experts)
        for i, expert in enumerate(self.experts, 1):
            weight, seen, inner, outer = weights[:, i : i + 1], x, gate, up
            rows = torch.empty(0)
            if not everyone:
                rows = weights[:, i].nonzero()[:, 0]
                weight, seen, outer = weight[rows], x[rows], up[rows]
                inner = None if gate is None else gate[rows]
            inner = None if inner is None else inner + expert("gate", seen)
            hidden = weight * self._activate(inner, outer + expert("up", seen))
            down = expert("down", hidden)
            mixed = mixed + hidden if everyone else mixed.index_add(0, rows, hidden)
            extra = extra + down if everyone else extra.index_add(0, rows, down)
        y: torch.Tensor = self.public("down")(mixed)
        bias: torch.Tensor | None = getattr(self.public("down"), "bias", None)
        if bias is not None and not self.renormalise:
            # Each expert has the bias: it enters with the sum of the weights, which here may be below 1.
            y = y + (weights.sum(1, keepdim=True) - 1) * bias
        y = y + extra
        return y.reshape(hidden_states.shape)

    def _activate(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        return self.activation(up) if gate is None else self.activation(gate) * up


class Mixture(ExpertShapes, PreTrainedModel, GenerationMixin):
    """A public language model and owners' experts: a transformers model, which generates, saves and loads.

    Parameters
    ----------
    config : MixtureConfig
    public : transformers.PreTrainedModel, optional
        The public model, changed in place; made from the config by default.

    Raises
    ------
    InputError
        If the public model's feed-forward blocks have no known form.
    """

    config_class = MixtureConfig
    base_model_prefix = "public"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MixtureConfig, public: Any = None) -> None:
        super().__init__(config)
        if public is None:
            base = AutoConfig.for_model(**config.public)
            model_class: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(base)]
            public = model_class(base)
        self.public = public
        self.generation_config = public.generation_config
        self.forms = find_feed_forwards(public)
        self.blocks: list[MixtureBlock] = []
        self._digest: str | None = None
        for form in self.forms:
            block = MixtureBlock(form, public)
            block.top_k, block.renormalise = config.num_experts_per_tok, config.norm_topk_prob
            replace(public, form, block)
            for rank in config.ranks:
                block.add(rank)
            self.blocks.append(block)
        self.post_init()

    @classmethod
    def of(cls, public: Any, *, num_experts_per_tok: int | None = None, norm_topk_prob: bool = True) -> Mixture:
        """Make a mixture without experts of a public model, which is changed in place."""
        config = MixtureConfig(
            public.config.to_dict(), num_experts_per_tok=num_experts_per_tok, norm_topk_prob=norm_topk_prob
        )
        return cls(config, public)

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load as every transformers model does, with the weights aligned: the mixture computes what was saved."""
        return align_loaded(super().from_pretrained(*arguments, **options))

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights alone: they are loaded."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do as the public model's forward: token ids [N, T] to an output with ``logits`` [N, T, vocabulary]."""
        return self.public(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the public model does, with the experts in it."""
        # A folder has one generation config, which loading gives the mixture.
        self.public.generation_config = self.generation_config
        return self.public.generate(*args, **kwargs)

    def get_input_embeddings(self) -> Any:
        """Return the public model's token embeddings."""
        return self.public.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the public model's head."""
        return self.public.get_output_embeddings()

    @property
    def owners(self) -> list[str]:
        """Owners of the experts, in the order of the router's rows."""
        return list(self.config.owners)

    @property
    def public_digest(self) -> str:
        """SHA-256 of the public model's weights; its first reading takes a moment."""
        if self._digest is None:
            self._digest = public_digest(self.public, self.forms)
        return self._digest

    @torch.no_grad()
    def add_expert(self, expert: Expert) -> None:
        """Merge an owner's expert: its updates beside the others', its rows below the routers'.

        Raises
        ------
        ValueError
            If the owner has one already, its arrays are not of its rank's names and shapes, or it was trained against
            other public weights.
        """
        if expert.owner in self.config.owners:
            raise ValueError(f"owner {expert.owner} has an expert already")
        if expert.public_digest and expert.public_digest != self.public_digest:
            raise ValueError(f"owner {expert.owner} trained against other public weights")
        expected = array_shapes(self.projections(), self.routers(), expert.rank)
        shapes = {name: tuple(array.shape) for name, array in expert.arrays.items()}
        if shapes != expected:
            wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
            found, wanted = shapes.get(wrong[0]), expected.get(wrong[0])
            raise ValueError(f"{wrong[0]} of owner {expert.owner} has shape {found}, expected {wanted}")
        for form, block in zip(self.forms, self.blocks, strict=True):
            updates = block.add(expert.rank)
            for role, path in form.projections.items():
                for factor in ("delta",) if expert.rank == FULL else ("lora_A", "lora_B"):
                    getattr(updates, f"{role}_{factor}").copy_(expert.arrays[f"{path}.{factor}"])
            block.router[-1] = expert.arrays[f"{form.path}.router"][0].to(block.router)
            block.router_bias[-1] = expert.arrays[f"{form.path}.router_bias"][0, 0].to(block.router)
        self.config.owners = [*self.config.owners, expert.owner]
        self.config.ranks = [*self.config.ranks, expert.rank]

    def remove_expert(self, owner: str) -> None:
        """Let an owner opt out: the result equals never having merged its expert.

        Raises
        ------
        InputError
            If the mixture has no expert of that owner.
        """
        if owner not in self.config.owners:
            raise InputError("owner", owner, f"has no expert here; owners: {', '.join(self.config.owners) or 'none'}")
        index = self.config.owners.index(owner)
        for block in self.blocks:
            block.remove(index)
        for name in ("owners", "ranks"):
            kept = list(getattr(self.config, name))
            del kept[index]
            setattr(self.config, name, kept)

    def expert(self, owner: str) -> Expert:
        """Copy an owner's expert out, on the CPU."""
        index = self.config.owners.index(owner)
        arrays: Arrays = {}
        for form, block in zip(self.forms, self.blocks, strict=True):
            updates = block.experts[index]
            for role, path in form.projections.items():
                for name, value in updates.named_parameters():
                    if name.startswith(f"{role}_"):
                        arrays[f"{path}.{name.removeprefix(f'{role}_')}"] = value.detach().cpu().clone()
            arrays[f"{form.path}.router"] = block.router[index + 1 : index + 2].detach().cpu().clone()
            arrays[f"{form.path}.router_bias"] = block.router_bias[index + 1].reshape(1, 1).detach().cpu().clone()
        return Expert(owner, self.config.ranks[index], arrays, self.public_digest)

    @torch.no_grad()
    def set_public_rows(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Set the public expert's router rows, ``BLOCK.public_router`` [1, d]; a block without one keeps its own."""
        for form, block in zip(self.forms, self.blocks, strict=True):
            if f"{form.path}.public_router" in arrays:
                block.router[0] = arrays[f"{form.path}.public_router"][0].to(block.router)

    def public_rows(self) -> Arrays:
        """Copy the public expert's router rows, on the CPU."""
        pairs = zip(self.forms, self.blocks, strict=True)
        return {f"{form.path}.public_router": block.router[:1].detach().cpu().clone() for form, block in pairs}


AutoConfig.register(MixtureConfig.model_type, MixtureConfig)
AutoModelForCausalLM.register(MixtureConfig, Mixture)


def load_mixture(folder: str | Path) -> Mixture:
    """Load a mixture from a folder of ``save_pretrained``, in its own dtype."""
    with quiet():
        model: Mixture = Mixture.from_pretrained(str(folder), dtype="auto", trust_remote_code=False)
    return model.eval()
