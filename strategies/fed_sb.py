"""Fed-SB: averaging of small square matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from fedlora.adapters import AdaptedModel
from fedlora.adapters.model import linear_shape
from fedlora.adapters.parameterisations import sb
from fedlora.arrays import Arrays
from fedlora.config import NODES, ClientSection, Config, Count, LearningRate, Section, Share, WireSection
from fedlora.data.tokens import FederatedData, TokenTable
from fedlora.errors import InputError
from fedlora.ranks import RankedOptions
from fedlora.registry import MECHANISMS
from fedlora.roles import FROZEN, HEAD, TRAINED, Exchange, Role, Roles
from fedlora.strategies.base import Contact, Payload, Sizes
from fedlora.strategies.ranked import RankedStrategy
from fedlora.strategies.weight_svd import weight_svd

_READ_BY_START: dict[str, Literal["nothing", "public", "private"]] = {
    "svd": "nothing",
    "public": "public",
    "pooled": "private",
    "federated": "nothing",  # clients read, and clip and noise what they answer
}
"""By ``method.init``."""

_ANSWER = Role(trained=True, down="never", up="value")


class FedSBOptions(RankedOptions):
    """``[method]`` of a run of Fed-SB."""

    init: Literal["svd", "public", "pooled", "federated"] = Field(
        default="svd",
        description="What B and A start from: the weights (svd), a gradient on data.public (public), one that the "
        "clients sum up in two exchanges, which privacy covers (federated), or one on their pooled training examples, "
        "which no privacy covers (pooled).",
    )
    init_examples: Count = Field(
        default=500,
        description="Maximum number of examples for the gradient; with init = federated, of each client.",
    )
    init_learning_rate: LearningRate = Field(
        default=1e-4, description="Size of the step along the gradient, at which dW starts."
    )
    init_oversampling: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=8, description="Vectors with which the federated start samples the gradient, beyond the rank."
    )
    init_share: Share = Field(
        default=0.3, description="Share of privacy.target_epsilon that the federated start may spend."
    )
    init_not_covered: bool = Field(
        default=False, description="Allow the pooled start under privacy: epsilon does not cover what it reads."
    )

    def sketch_width(self, layers: Iterable[tuple[int, int]]) -> int:
        """Return k, the columns of the federated start's sketches, for layers of these shapes."""
        return min(self.rank + self.init_oversampling, *(min(shape) for shape in layers))


class FedSB(RankedStrategy):
    """Fed-SB: dW = s B R A, B and A frozen and orthonormal, only R [r, r] travels (Singhal et al., arXiv 2502.15436).

    dW is linear in R, so that the mean of the Rs is exactly the mean of the updates. A client of a smaller rank trains
    the leading block of R between the first columns of B and rows of A, which is exact too.

    Notes
    -----
    ``method.init`` chooses the start. ``svd`` (default): B and A are the leading singular vectors of W0, R = 0, after
    LoRA-XS; no data is read. Of a large W0 they are nearly the leading ones (:func:`fedlora.svd.truncated_svd`).
    ``public``: the published gradient start, on ``data.public``. ``pooled``: the published start, on the clients'
    pooled training examples, as the paper does; no privacy budget covers it.

    ``federated``, not in the paper, is a randomised SVD of the clients' mean gradient G [m, n] of each layer, in two
    exchanges before the first round. The server sends the seed of a Gaussian Omega [n, k], with k = r +
    ``method.init_oversampling``; clients answer with the mean of g_b Omega over their examples b. The server sends an
    orthonormal basis Q [m, k] of the weighted mean G Omega; clients answer with the mean of Q^T g_b. The SVD of
    Q Q^T G gives B and A. Only sums of clients are used. R starts as the singular values along -G, scaled so that dW
    has the norm eta sqrt(m n) of the sign step, whose signs no sum of gradients can give.

    Each answer is a step of DP-SGD (:func:`~fedlora.adapters.parameterisations.sb.sketching_factors`), and private as
    any other. An example enters with probability q, independently in both exchanges. Its g_b Omega, of all layers as
    one vector, is shortened to at most C = ``privacy.max_grad_norm``; so is its Q^T g_b. Each depends on that example
    alone, given Omega or Q. With an example more or less, a sum of such vectors therefore moves by at most C: that is
    its sensitivity, whatever Omega, Q, the ranks and the number of layers are. The client adds Gaussian noise of
    standard deviation sigma C to each number. Omega is independent of all data. Q is made of noisy sums alone, so that
    it costs nothing by itself, and the second exchange composes with the first adaptively. So the start costs two
    Poisson-sampled Gaussian steps of sample rate q = min(1, ``method.init_examples`` / n) and noise multiplier sigma.
    Sigma is calibrated so that they stay within ``method.init_share`` of the target epsilon; then the noise of the
    rounds is calibrated for both together, so that the whole run stays within the target. Variance adds up: a share of
    0.3 costs about 0.3^2 of what the rounds may release, which is 5 % more noise there.

    Under privacy of clients, a client's answer is clipped as one vector, and noised by the server, as its updates are.
    """

    name = "fed-sb"
    title = "Fed-SB: square matrices averaged"
    paper = "arXiv 2502.15436"
    sends = "R: r² each way"
    exact = True
    color, marker = "blue", "circle"
    Options = FedSBOptions
    options: FedSBOptions
    parameterisation = "sb"
    client = "fedlora.clients.fed_sb:SketchingHalf"
    learning_rates: ClassVar[dict[str, float]] = {"adamw": 6e-2, "sgd": 1.0}

    @classmethod
    def roles(cls, config: Config, server_round: int) -> Roles:
        """R is trained; B and A are sent once."""
        return {"sb_A": FROZEN, "sb_B": FROZEN, "sb_R": TRAINED, HEAD: TRAINED}

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a start that reads examples which are not there, or private ones without leave; check the ranks."""
        super().check(config)
        options = config.method
        assert isinstance(options, FedSBOptions)
        if options.init == "pooled" and config.data.name == NODES:
            remedy = "reads the clients' examples, which nodes keep; use svd or public"
            raise InputError("method.init", "pooled", remedy)
        if options.init == "public" and config.data.public is None:
            raise InputError("method.init", "public", "needs data.public: examples that the server may read")
        if options.init == "pooled" and config.privacy.mode != "none" and not options.init_not_covered:
            remedy = (
                "reads private data without noise, so epsilon would not cover it; "
                "use svd, or set method.init_not_covered = true"
            )
            raise InputError("method.init", "pooled", remedy)

    @classmethod
    def unused(cls, config: Config) -> Iterator[tuple[str, str]]:
        """Only a start from a gradient reads examples."""
        assert isinstance(config.method, FedSBOptions)
        options, mode = config.method, config.privacy.mode
        if options.init == "svd":
            yield "init_examples init_learning_rate init_not_covered", "init svd needs no data"
        if options.init != "federated":
            yield "init_oversampling init_share", f"init {options.init} has no exchanges with clients"
            return
        yield "init_not_covered", "privacy covers the federated start"
        if not MECHANISMS.get(mode).clips_examples or config.privacy.target_epsilon is None:
            yield "init_share", "there is no target epsilon of a client's own"

    @classmethod
    def start_reads(cls, config: Config) -> Literal["nothing", "public", "private"]:
        """The pooled start reads private data without noise."""
        assert isinstance(config.method, FedSBOptions)
        return _READ_BY_START[config.method.init]

    @classmethod
    def start_exchanges(cls, config: Config) -> Sequence[Exchange]:
        """The federated start has two: for G Omega, where B's gradient comes back, and for Q^T G, where A's does."""
        options = config.method
        assert isinstance(options, FedSBOptions)
        if options.init != "federated":
            return ()
        sections: dict[str, Section] = {
            "client": ClientSection(
                optimizer="sgd",
                local_steps=1,
                batch_size=options.init_examples,
                physical_batch_size=config.client.physical_batch_size or config.client.batch_size,
                group_by_length=config.client.group_by_length,
                gradient_checkpointing=config.client.gradient_checkpointing,
            ),
            "wire": WireSection(),
            "server": config.server.model_copy(update={"optimizer": "fedavg", "learning_rate": None}),
            "method": options.model_copy(update={"dropout": 0.0, "ranks": None, "device_profile": None}),
        }
        head = {HEAD: Role(down="round")}
        sketch = Exchange({"sb_B": _ANSWER, **head}, sections=sections)
        return sketch, Exchange({"sb_A": _ANSWER, "sb_B": Role(down="round"), **head}, sections=sections)

    @classmethod
    def start_examples(cls, config: Config) -> int:
        """Of the federated start, in each exchange."""
        assert isinstance(config.method, FedSBOptions)
        return config.method.init_examples if config.method.init == "federated" else 0

    @classmethod
    def start_share(cls, config: Config) -> float:
        """As configured."""
        assert isinstance(config.method, FedSBOptions)
        return config.method.init_share

    def start_request(self, adapted: AdaptedModel, exchange: int) -> Arrays:
        """Zeros for G Omega; Q, and zeros for Q^T G. The head that the gradient depends on goes with both."""
        found: Arrays = dict(adapted.arrays(adapted.head_names))
        shapes = {path: linear_shape(adapter.base) for path, adapter in adapted.adapters.items()}
        width = self.options.sketch_width(shapes.values())
        for path, (m, n) in shapes.items():
            if exchange == 1:
                found[f"{path}.sb_B"] = torch.zeros(m, width)
            else:
                found[f"{path}.sb_B"] = sb.sketch_basis(self.gathered[f"{path}.sb_B"])
                found[f"{path}.sb_A"] = torch.zeros(width, n)
        return found

    def client_settings(self, client: int, server_round: int) -> dict[str, str | int | float | bool]:
        """Before the first round, the seed of Omega."""
        settings = super().client_settings(client, server_round)
        return settings if server_round else settings | {"sketch": self.config.run.seed}

    def learning_rate(self, server_round: int) -> float:
        """Before the first round it is 1, so that a step is the direction of descent itself."""
        return super().learning_rate(server_round) if server_round else 1.0

    def start_arrays(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """Return B, A and R for every layer, by ``method.init``."""
        rank = self.options.rank
        # s multiplies R as well: dW = s B R A is to start at the step, whatever alpha.
        rate = self.options.init_learning_rate / self.config.scaling()
        if self.options.init == "svd":
            factors = {path: sb.factors_from_pairs(pairs) for path, pairs in weight_svd(adapted, rank).items()}
        elif self.options.init == "federated":
            factors = {}
            for path, adapter in adapted.adapters.items():
                basis = sb.sketch_basis(self.gathered[f"{path}.sb_B"])
                norm = rate * math.sqrt(math.prod(linear_shape(adapter.base)))
                factors[path] = sb.factors_from_projection(basis, self.gathered[f"{path}.sb_A"], rank, norm)
        else:
            gradients = mean_gradients(adapted, *self._start_examples(data), self.config.server.batch_size)
            factors = {path: sb.factors_from_gradient(g, rank, rate) for path, g in gradients.items()}
        return {f"{path}.{name}": value for path, parts in factors.items() for name, value in parts.items()}

    def probe(self, adapted: AdaptedModel, data: FederatedData) -> Arrays:
        """A forecast has no clients that could help to make the start: drawn arrays take its place."""
        if self.options.init != "federated":
            return super().probe(adapted, data)
        arrays = adapted.drawn(self.config.run.seed)
        adapted.set_shared(arrays)
        return {name: arrays[name] for name in self.trained_names(adapted)}

    def _start_examples(self, data: FederatedData) -> tuple[TokenTable, np.ndarray]:
        table = data.public if self.options.init == "public" else data.train
        if table is None:
            raise InputError("method.init", "public", "needs data.public: examples that the server may read")
        if self.options.init == "pooled":
            rows = np.concatenate([np.asarray(data.partition[i]) for i in range(len(data.partition))])
        else:
            rows = np.arange(len(table))
        rng = np.random.default_rng([self.config.run.seed, 0xB])
        return table, np.sort(rng.permutation(rows)[: self.options.init_examples])

    def payload(self, sizes: Sizes, contact: Contact) -> Payload:
        """r^2 a layer, both ways; B and A once, r (m + n); in the federated start k m up, then k m down and k n up."""
        if not contact.round:
            width = self.options.sketch_width(sizes.layers)
            left, right = (width * sum(sides) for sides in zip(*sizes.layers, strict=True))
            if contact.exchange == 1:
                return Payload(initial=0, down=sizes.head, up=left)
            return Payload(initial=0, down=sizes.head + left, up=right)
        rank = sizes.rank
        numbers = len(sizes.layers) * rank * rank + sizes.head
        return Payload(initial=sum(rank * (m + n) for m, n in sizes.layers), down=numbers, up=numbers)


def mean_gradients(
    adapted: AdaptedModel, table: TokenTable, rows: np.ndarray, batch_size: int
) -> dict[str, torch.Tensor]:
    """Gradient [m, n] of the loss with respect to every adapted layer's W0, averaged over examples."""
    weights = {path: adapter.base.weight for path, adapter in adapted.adapters.items()}
    adapted.model.eval()
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            batch = table.batch(chunk, adapted.device)
            adapted.layout.set_rows([len(chunk)])
            (table.task.loss(adapted.outputs(batch, table.task), batch["labels"]).sum() / len(rows)).backward()
        gradients = {}
        for path, adapter in adapted.adapters.items():
            gradient = weights[path].grad
            assert isinstance(gradient, torch.Tensor)
            # Conv1D stores its weight, and so its gradient, transposed.
            oriented = gradient if isinstance(adapter.base, torch.nn.Linear) else gradient.T
            gradients[path] = oriented.detach().cpu().clone()
        return gradients
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
