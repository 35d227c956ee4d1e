"""FlexMoRE: owners grow experts of their own rank, the server merges them into one mixture."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import nn

from fedlora.adapters import AdaptedModel
from fedlora.arrays import Arrays
from fedlora.communication.wire import decode
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.devices import Placement
from fedlora.errors import InputError, plain_text
from fedlora.experts.expert import FULL, Expert, Rank, array_shapes, break_even_rank, combine, numbers
from fedlora.experts.expert_model import FACTORS, ExpertModel, adapt_experts, check_rank, trained_rank
from fedlora.experts.expert_start import mean_states, router_row
from fedlora.experts.folder import EXPERTS, MIXTURE, folder_name, save_expert
from fedlora.experts.merged import PUBLIC, MergedModel, expert_of, split_owners
from fedlora.experts.mixture import Mixture
from fedlora.experts.options import ExpertOptions, expert_options
from fedlora.experts.router import tune_router
from fedlora.models import load_tokenizer, pretrained_source, quiet
from fedlora.ranks import check_ranks, client_ranks, has_rank, listed_ranks
from fedlora.roles import FROZEN, Role, Roles
from fedlora.shared_base import shared_base
from fedlora.strategies.base import Contact, FederatedStrategy, Payload, Planned, Sizes
from fedlora.strategies.flexmore.opting_out import opt_out
from fedlora.strategies.replies import ReplyError
from fedlora.strategies.updates import Shapes, Update, Updates
from fedlora.timeline import phase
from fedlora.training import evaluate

log = logging.getLogger("fedlora")

FULL_RATE = 0.4
"""A full expert's learning rate, as a share of an adapter's: they are best at 8e-4 and 2e-3 (experiments/studies)."""

RESERVED = ("public", MIXTURE)
"""Reserved names: reports use them for models."""


class FlexMoRE(FederatedStrategy):
    """FlexMoRE: experts of mixed ranks beside a frozen public model (arXiv 2602.08818, on FlexOlmo, 2507.07024).

    Every data owner trains one expert for all feed-forward blocks, and its router rows, in isolation against the frozen
    public model; the server concatenates the experts and stacks the rows. Nothing is averaged, so nothing is lost, and
    an owner may leave again.

    Notes
    -----
    *Published*: FlexOlmo's isolated training against the public expert, router rows that start from the mean embedding
    of up to 1,000 documents, a bias that enters as min(b, 0), the merge, opting out, router tuning on public data; and
    FlexMoRE's post-hoc truncation of full experts by SVD, with B = U sqrt(S), A = sqrt(S) V^T and no alpha
    (``method.extraction = "svd"``).

    *Ours*: running it as a federation; training the low-rank expert directly (``direct``, the default), with
    s = alpha / sqrt(r); router rows from the hidden states at each router's own input instead of an embedder's; the
    public expert's row 0; renormalising the kept weights when fewer than all experts are active;
    several clients of one domain, whose experts are combined exactly in dW; further rounds, which refine the owners'
    experts against the same public model; and DP-SGD, the start of the router rows charged. With public text the rows
    under privacy may start from that instead (``method.router_init = "public"``).

    The mixture itself is not sent to the clients: ``experts`` in summary.json says what that would take.
    """

    name = "flexmore"
    title = "FlexMoRE: experts of mixed ranks in one mixture"
    paper = "arXiv 2602.08818"
    sends = "an expert of the owner's rank: r (m + n) or m n each way"
    exact = True
    reads_single_updates = True
    persistent = False
    color, marker = "purple", "up"
    Options = ExpertOptions
    options: ExpertOptions
    parameterisation = "expert"
    client = "fedlora.clients.flexmore:OwnersHalf"
    outputs = (MIXTURE, EXPERTS)
    quantized = False
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 2e-3, "sgd": 0.1}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.ranks: list[Rank] = []
        self.owners: list[str] = []
        self.public_digest = ""
        self.projections: dict[str, tuple[int, int]] = {}
        self.routers: dict[str, int] = {}
        self._experts: dict[str, Arrays] = {}

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """All of an expert is trained, and started by its owner; the public expert's rows are sent once."""
        own = Role(trained=True, down="round", up="value", made_by="client")
        return dict.fromkeys(FACTORS, own) | {"public_router": FROZEN}

    @classmethod
    def adapt(cls, model: nn.Module, config: Config) -> AdaptedModel:
        """Put an owner's expert beside every feed-forward block."""
        return adapt_experts(model, config)

    # Options.

    @classmethod
    def check(cls, config: Config) -> None:
        """Check the task, every client's rank, and that there is public text where it is read."""
        options = expert_options(config)
        if config.model.task != "causal-lm":
            remedy = f"{cls.name} makes a mixture of language models; use causal-lm"
            raise InputError("model.task", config.model.task, remedy)
        if config.server.early_stopping_patience is not None:
            remedy = (
                f"{cls.name} tunes routers and judges experts after a last round that is known before; leave it out"
            )
            raise InputError("server.early_stopping_patience", config.server.early_stopping_patience, remedy)
        check_ranks(config)
        reads_public = {
            "router_init": options.router_init == "public",
            "router_tuning_steps": options.router_tuning_steps > 0,
        }
        for key, reads in reads_public.items():
            if reads and config.data.public is None:
                remedy = "needs data.public: examples that the server may read"
                raise InputError(f"method.{key}", getattr(options, key), remedy)

    @classmethod
    def unused(cls, config: Config) -> Iterator[tuple[str, str]]:
        """Experts lie in the feed-forward blocks, and have ranks of their own where these are given."""
        options = expert_options(config)
        yield "target_modules exclude_modules", f"{cls.name} adapts the feed-forward blocks"
        if options.mixed:
            yield "rank", "every client has a rank of its own"
        if options.router_init == "public":
            yield "router_documents", "router rows start from public text"
        if options.router_tuning_steps == 0:
            yield "router_tuning_learning_rate", "the router is not tuned"

    @classmethod
    def start_examples(cls, config: Config) -> int:
        """Router rows start from so many of an owner's documents, or from public text."""
        options = expert_options(config)
        return options.router_documents if options.router_init == "documents" else 0

    @classmethod
    def start_reads(cls, config: Config) -> Literal["nothing", "public", "private"]:
        """Router rows may start from public text; that owners' documents make one is the clients' work."""
        return "public" if expert_options(config).router_init == "public" else "nothing"

    # What a client is.

    def server_model(self, data: FederatedData, device: Placement | None = None) -> MergedModel:
        """Load the public model as a mixture without experts; learn the clients' ranks and owners."""
        public = shared_base(self.config, None, device or self.server_device())
        mixture = Mixture.of(
            public, num_experts_per_tok=self.options.num_experts_per_tok, norm_topk_prob=self.options.norm_topk_prob
        )
        owners = self.names or client_owners(data)
        ranks = client_ranks(self.config, self.names or data.client_names, complete=not self.names)
        self.register(mixture, ranks, owners)
        for rank in listed_ranks(self.config):  # of those too who are not there yet
            check_rank(rank, self.projections, "method.ranks")
        return MergedModel(mixture.eval())

    def register(self, mixture: Mixture, ranks: list[Rank], owners: list[str]) -> None:
        """Take note of every client's rank and owner, and of what their experts must fit."""
        self.projections, self.routers = mixture.projections(), mixture.routers()
        # A skeleton has no weights to tell apart.
        self.public_digest = "" if next(mixture.parameters()).is_meta else mixture.public_digest
        self.enrol(ranks, owners)

    def refuses(self, client: int, name: str) -> InputError | None:
        """A node needs a rank, and a name that is nobody else's in the results."""
        if name in RESERVED:
            return InputError(
                "name", name, "is a reserved name of models in results; that node does not take part, rename it"
            )
        if not has_rank(self.config, client, name):
            remedy = f"has no rank for node {name}, which does not take part; add it"
            return InputError("method.ranks", self.options.ranks, remedy)
        return None

    def enrol(self, ranks: list[Rank], owners: list[str]) -> None:
        """Check all clients' ranks and owners; those that are known come first."""
        known = len(self.owners)
        self.ranks, self.owners = ranks, list(owners)
        for name in RESERVED:
            if name in owners:
                raise InputError(
                    "data.partition.column", name, "is a reserved name of models in results; rename that owner"
                )
        layers = list(self.projections.values())
        for client, rank in enumerate(ranks[known:], known):
            check_rank(rank, self.projections, "method.ranks" if self.options.ranks else "method.rank")
            if rank != FULL and rank > break_even_rank(layers):
                log.warning(
                    "client %d (%s): rank %d is above the break-even rank %.0f, from which a full expert costs no more",
                    *(client, owners[client], rank, break_even_rank(layers)),
                )

    def owner_rank(self, owner: str) -> Rank:
        """Return the rank of an owner's expert: the largest of its clients'."""
        ranks = [rank for rank, of in zip(self.ranks, self.owners, strict=True) if of == owner]
        return FULL if FULL in ranks else max(rank for rank in ranks if rank != FULL)

    # The wire.

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """By the client's own rank: r (m + n) a projection, or m n where it is full, and the router rows.

        Down once its owner has an expert. Once, the router rows' start, where public text makes it.
        """
        count = self.expert_numbers(self.ranks[contact.client])
        owner = self.owners[contact.client]
        known = any(self.owners[client] == owner for clients in contact.replied.values() for client in clients)
        rows = sum(self.routers.values()) if self.options.router_init == "public" else 0
        return Payload(initial=rows, down=count if known else 0, up=count)

    def expert_numbers(self, rank: Rank) -> int:
        """Count the numbers of an expert of a rank, with its router rows."""
        head = sum(self.routers.values()) + len(self.routers)
        return numbers(list(self.projections.values()), rank) + head

    def _expert_bytes(self, rank: Rank) -> int:
        """Bytes in which an owner sends an expert of a rank."""
        shapes = array_shapes(self.projections, self.routers, rank)
        return sum(map(self.codecs.up.payload_bytes, shapes.values()))

    def planned(self, adapted: AdaptedModel) -> Planned:
        """Every owner whose clients are asked has an expert at the end, which is evaluated on its own too."""
        rounds = range(1, self.config.run.rounds + 1)
        owners = {self.owners[client] for server_round in rounds for client in self.sample(server_round)}
        return replace(
            super().planned(adapted),
            trainable_parameters=sum(self.expert_numbers(self.owner_rank(owner)) for owner in owners),
            final_evaluations=2 + len(owners),  # the mixture, the public model
            ranks=tuple(self.ranks),
        )

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """All experts' router rows, the public one's too, from public text if so configured.

        Else the public expert's are 0, and nothing is sent. FlexOlmo's come from public documents; beside rows from the
        owners' documents, 0 makes the better mixture (experiments/studies).
        """
        if self.options.router_init != "public":
            return {}
        assert data.public is not None
        assert isinstance(adapted, MergedModel)
        rows = np.arange(len(data.public))
        chosen = np.sort(np.random.default_rng(self.config.run.seed).permutation(rows))
        chosen = chosen[: self.options.router_documents]
        mixture = adapted.mixture
        states = mean_states(adapted, mixture.blocks, data.public, chosen, self.config.server.batch_size)
        return {f"{path}.public_router": router_row(row)[None] for path, row in zip(self.routers, states, strict=True)}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every client its owner's expert, at its own rank; nothing where there is none yet."""
        if len(self.names) > len(self.owners):  # nodes that came after the start
            self.enrol(client_ranks(self.config, self.names, complete=False), self.names)
        self._experts = split_owners(decode(arrays))
        return super().configure_train(server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every client its owner's expert, which it evaluates beside the public one."""
        self._experts = split_owners(decode(arrays))
        return super().configure_evaluate(server_round, arrays, config, grid)

    def client_arrays(self, client: int) -> tuple[Hashable, Arrays]:
        """Its owner's expert at its rank."""
        owner, rank = self.owners[client], self.ranks[client]
        known = owner in self._experts
        part = self._at_rank(expert_of(owner, self._experts[owner]), rank).arrays if known else {}
        return (owner, rank), part

    def client_shapes(self, client: int) -> Shapes:
        """Those of an expert of the rank that it declared."""
        return array_shapes(self.projections, self.routers, self.ranks[client])

    def client_settings(self, client: int, server_round: int) -> dict[str, str | int | float | bool]:
        """Its rank, and the learning rate that goes with it."""
        rank = self.ranks[client]
        settings = super().client_settings(client, server_round)
        full = trained_rank(self.config, rank) == FULL
        settings["learning-rate"] = self.learning_rate(server_round) * (FULL_RATE if full else 1.0)
        settings["rank"] = str(rank)
        return settings

    def aggregate(self, updates: Updates) -> Arrays | None:
        """Merge: an owner's new expert takes the place of its last one; several clients' are combined in dW."""
        received: dict[str, list[tuple[float, Expert]]] = {}
        for update in updates:
            expert = self._expert(update.client, update.arrays)
            received.setdefault(expert.owner, []).append((update.weight, expert))
        merged = dict(self._experts)
        for owner, parts in received.items():
            merged[owner] = self._combined(owner, parts).arrays
        return {f"{owner}/{name}": array for owner in sorted(merged) for name, array in merged[owner].items()}

    def check_reply(self, client: int, message: Message) -> None:
        """Refuse a client that trained against other public weights, or says another rank than it declared."""
        facts = message.content.get("expert")
        if not isinstance(facts, ConfigRecord):
            raise ReplyError("it does not say its rank and public weights")
        rank = self.ranks[client]
        if facts.get("rank") != str(rank):
            raise ReplyError(plain_text(f"its rank is {facts.get('rank')!r}, but it declared {rank}"))
        if facts.get("public-digest") != self.public_digest:
            raise ReplyError("it trained against other public weights than the server's")

    def check_update(self, update: Update) -> None:
        """Refuse factors that are finite, but whose product is not."""
        expert = self._expert(update.client, update.arrays)
        for path in self.projections:
            found = expert.update(path)
            factors = (found,) if isinstance(found, torch.Tensor) else found
            # No entry of a product is above the product of the factors' norms.
            largest = torch.finfo(update.vector.dtype).max
            if not math.prod(float(torch.linalg.vector_norm(f)) for f in factors) < largest:
                raise ReplyError(f"the update of {path} is not finite")

    def _expert(self, client: int, arrays: Arrays) -> Expert:
        return Expert(self.owners[client], self.ranks[client], arrays, self.public_digest)

    def _combined(self, owner: str, parts: list[tuple[float, Expert]]) -> Expert:
        """Combine the experts of one owner's clients: sum p_i dW_i, at the owner's rank, and the mean of the rows."""
        rank = self.owner_rank(owner)
        total = sum(weight for weight, _ in parts)
        shares = [(weight / total if total else 1 / len(parts), expert) for weight, expert in parts]
        if len(shares) == 1:
            return self._at_rank(shares[0][1], rank)
        arrays: Arrays = {}
        for path in self.projections:
            update = combine([(p, expert.update(path)) for p, expert in shares], rank)
            arrays |= _named(path, update)
        for path in self.routers:
            for name in (f"{path}.router", f"{path}.router_bias"):
                wide = torch.stack([p * expert.arrays[name].double() for p, expert in shares]).sum(0)
                arrays[name] = wide.to(shares[0][1].arrays[name].dtype)
        return Expert(owner, rank, arrays, self.public_digest)

    def _at_rank(self, expert: Expert, rank: Rank) -> Expert:
        if expert.rank == rank:
            return expert
        arrays = {name: array for name, array in expert.arrays.items() if ".router" in name}
        for path in self.projections:
            arrays |= _named(path, combine([(1.0, expert.update(path))], rank))
        return Expert(expert.owner, rank, arrays, expert.public_digest)

    def probe(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """The largest of the clients' experts."""
        assert isinstance(adapted, ExpertModel)
        ranks = client_ranks(self.config, data.client_names)
        adapted.set_rank(FULL if FULL in ranks else max(rank for rank in ranks if rank != FULL))
        return adapted.arrays(self.trained_names(adapted))

    # The result.

    def refine(self, adapted: AdaptedModel, data: FederatedData, server_round: int) -> Arrays | None:
        """After the last round, tune the routers on public text, if so configured."""
        if not self.options.router_tuning_steps or server_round != self.config.run.rounds:
            return None
        assert isinstance(adapted, MergedModel)
        assert data.public is not None
        tune_router(adapted, data.public, self.config)
        experts = {owner: adapted.mixture.expert(owner).arrays for owner in adapted.mixture.owners}
        tuned = adapted.arrays()
        for owner, arrays in experts.items():
            tuned |= {f"{owner}/{name}": array.float() for name, array in arrays.items() if ".router" in name}
        rows = adapted.mixture.public_rows()
        return tuned | {f"{PUBLIC}/{name}": row.float() for name, row in rows.items()}

    def evaluate(self, adapted: AdaptedModel, data: FederatedData, server_round: int) -> dict[str, Any]:
        """Evaluate the mixture; at the end also the public model, and every expert with the public one alone.

        ``by_domain`` is the perplexity by model (public, mixture, OWNER) and domain.
        """
        assert isinstance(adapted, MergedModel)
        owners = list(adapted.experts)
        last = server_round == self.config.run.rounds
        metrics = super().evaluate(adapted, data, server_round)
        tables = {MIXTURE if owners else "public": _domains(metrics)}
        if last and owners:
            shown: dict[str, list[str]] = {"public": []} | {owner: [owner] for owner in owners}
            top_k = [block.top_k for block in adapted.mixture.blocks]
            with phase("experts", "evaluating each expert", len(shown)) as here:
                for name, chosen in shown.items():
                    adapted.show(chosen)
                    for block in adapted.mixture.blocks:
                        block.top_k = None  # as its owner trained it: both active
                    found = evaluate(adapted, data.test, self.config.server.batch_size, data.domain_names)
                    tables[name] = _domains(found)
                    here.advance()
            for block, k in zip(adapted.mixture.blocks, top_k, strict=True):
                block.top_k = k
            adapted.show(owners)
        return metrics | {"by_domain": tables}

    def export(self, adapted: AdaptedModel, data: FederatedData, folder: Path) -> None:
        """Write ``experts/OWNER/`` and ``mixture/``."""
        assert isinstance(adapted, MergedModel)
        base = pretrained_source(self.config)
        for owner in adapted.mixture.owners:
            expert = adapted.experts[owner]
            known = Expert(owner, expert.rank, expert.arrays, self.public_digest)
            save_expert(known, adapted.mixture, folder / EXPERTS / folder_name(owner), base)
        with quiet():
            adapted.mixture.save_pretrained(str(folder / MIXTURE))
        load_tokenizer(self.config).save_pretrained(str(folder / MIXTURE))

    @classmethod
    def opt_out(cls, folder: Path, owner: str) -> Mixture:
        """Remove an owner's expert from a finished run; see :mod:`~fedlora.strategies.flexmore.opting_out`."""
        return opt_out(folder, owner)

    def facts(self, adapted: AdaptedModel) -> dict[str, Any]:
        """Return what summary.json says of the experts."""
        assert isinstance(adapted, MergedModel)
        experts = {
            owner: {
                "rank": expert.rank,
                "clients": self.owners.count(owner),
                "bytes": self._expert_bytes(expert.rank),
                "full_bytes": self._expert_bytes(FULL),
            }
            for owner, expert in adapted.experts.items()
        }
        return {
            "experts": experts,
            "break_even_rank": break_even_rank(list(self.projections.values())),
            "router_tuned": self.options.router_tuning_steps > 0,
        }

    def summary(self) -> None:
        """Log what runs."""
        log.info("%s, %d clients of %d owners", self.title, len(self.nodes), len(set(self.owners)))
        pairs = enumerate(zip(self.owners, self.ranks, strict=True))
        ranks = {f"client {client} ({owner})": rank for client, (owner, rank) in pairs}
        log.info("ranks: %s", json.dumps(ranks))


def client_owners(data: FederatedData) -> list[str]:
    """Name the owner of every client's expert.

    That is the domain of its examples where all clients hold one domain each, so that clients of one domain share an
    expert; else the client's own name.
    """
    if data.domain_names and data.train.domain is not None:
        of = np.asarray(data.train.domain)
        domains = [np.unique(of[rows]) for rows in data.partition]
        if all(len(found) == 1 for found in domains):
            return [data.domain_names[int(found[0])] for found in domains]
    return [name if name.strip("0123456789") else f"client-{name}" for name in data.client_names]


def _named(path: str, update: Any) -> Arrays:
    if isinstance(update, torch.Tensor):
        return {f"{path}.delta": update}
    b, a = update
    return {f"{path}.lora_A": a, f"{path}.lora_B": b}


def _domains(metrics: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = metrics.get("by_domain") or {"all": metrics["perplexity"]}
    return found
