"""``[run]``, ``[method]``, ``[client]`` and ``[server]``: what is trained, how, and for how many rounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PrivateAttr

from fedlora.config.section import NODES, Count, Fraction, LearningRate, Name, Norm, Positive, Section, Seed
from fedlora.errors import InputError
from fedlora.registry import AGGREGATORS, CLIENT_SAMPLINGS, CODECS, CORRECTIONS, MECHANISMS, SERVER_OPTIMIZERS

if TYPE_CHECKING:
    from fedlora.config.schema import Config

Modules = str | Annotated[list[str], Field(min_length=1)] | None


class RunSection(Section):
    """``[run]``: the name of the run (its folder is runs/NAME), its seed and its number of rounds."""

    name: Name = Field(default="run", description="Name of the run; its folder is runs/NAME.")
    seed: Seed = Field(default=0, description="Seed of all random draws.")
    rounds: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=10, description="Number of rounds.", json_schema_extra={"unit": "rounds"}
    )
    strategy: str | None = Field(
        default=None, description="Custom strategy: class, arguments and digest; written by simulate()."
    )
    client_app: str | None = Field(
        default=None, description="Custom client: its source and digest; written by simulate()."
    )


class MethodSection(Section):
    """``[method]``: what is trained and how it is averaged; names follow PEFT.

    These keys are common to all methods. A method adds its own in a subclass, :attr:`fedlora.methods.Method.Options`.
    """

    name: str = Field(description="The method; fedlora methods lists them.")
    rank: Positive = Field(default=8, description="Rank r of the adapters.")
    alpha: Annotated[float, Field(ge=1e-4, le=1e6)] | None = Field(
        default=None, description="The adapter's factor is s = alpha / rank; alpha = rank by default, so that s = 1."
    )
    target_modules: Modules = Field(
        default=None,
        description='Modules with adapters: a list of names, a regular expression, or "all-linear"; by default every '
        "attention's query and value.",
    )
    exclude_modules: Modules = Field(
        default=None, description="Modules without adapters: a list of names or a regular expression; none by default."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Probability with which an input of an adapter is dropped in training."
    )

    _others: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def others(self) -> dict[str, str]:
        """Keys of other methods that were given, and why they are left out."""
        return self._others


class ClientSection(Section):
    """``[client]``: local training."""

    optimizer: Literal["sgd", "adamw"] = Field(default="adamw", description="The clients' optimizer.")
    learning_rate: LearningRate | None = Field(
        default=None, description="Learning rate of the clients; by default the method's own for the optimizer."
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="How the learning rate falls over the rounds: not at all, linearly to 0, or by half a cosine.",
    )
    warmup_rounds: Annotated[int, Field(ge=0, le=100_000)] = Field(
        default=0,
        description="Number of first rounds over which the learning rate rises linearly.",
        json_schema_extra={"unit": "rounds"},
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="Momentum of sgd.")
    weight_decay: Annotated[float, Field(ge=0, le=100)] = Field(default=0.0, description="Weight decay.")
    max_grad_norm: Norm | None = Field(
        default=None,
        description="Norm to which a batch's gradient is clipped, without privacy; no clipping by default.",
    )
    batch_size: Count = Field(
        default=32,
        description="Number of examples in a local step; under privacy the expected number.",
        json_schema_extra={"unit": "examples"},
    )
    physical_batch_size: Count | None = Field(
        default=None,
        description="Number of examples in memory at once, to which a batch is split. By default as many as keep a "
        "GPU busy, fewer where they do not fit its memory; on the CPU whole batches.",
        json_schema_extra={"unit": "examples"},
    )
    group_by_length: bool = Field(
        default=False,
        description="Put examples of similar length into the same physical batches of a batch, which saves padding; "
        "the batch stays the same.",
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="Recompute each transformer layer's activations in the backward pass instead of keeping them: "
        "much less memory, about a third more time. auto does so on a GPU if even small parts of a batch would not "
        "fit.",
    )
    local_steps: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        default=None,
        description="Number of steps that a client takes in a round, instead of local_epochs.",
        json_schema_extra={"unit": "steps a round"},
    )
    local_epochs: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        default=None,
        description="Number of passes over its examples that a client takes in a round; 1 by default.",
        json_schema_extra={"unit": "epochs a round"},
    )
    proximal_mu: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0,
        description="FedProx: mu of mu/2 |w - w_start|^2, which local training adds to the loss; w_start is where the "
        "client began the round. Under DP it is added after the noise.",
    )

    keep_optimizer_state: bool = Field(
        default=False,
        description="Let each client keep its optimizer's moments from round to round, instead of starting anew: one "
        "number per trained parameter with sgd's momentum, two with adamw. They are not sent.",
    )

    correction: Annotated[str, AfterValidator(CORRECTIONS.check)] = Field(
        default="none",
        description="What is added to each local gradient against client drift: none, or scaffold's control "
        "variates. They are sent beside the trained arrays, as many numbers again each way, and never rounded.",
    )

    def check(self, config: Config) -> None:
        """Refuse two lengths of local training."""
        if self.local_steps is not None and self.local_epochs is not None:
            given = f"{self.local_steps} and local_epochs = {self.local_epochs}"
            raise InputError("client.local_steps", given, "give one of the two")

    def unused(self, config: Config) -> Iterator[tuple[str, str]]:
        """Momentum is of sgd, a batch's clipping of training without privacy, groups of a batch that is split."""
        if MECHANISMS.get(config.privacy.mode).clips_examples:
            yield "max_grad_norm", "under DP each example is clipped instead"
        if self.optimizer == "adamw":
            yield "momentum", "adamw has its own moments"
        if 0 < self.weight_decay < 1e-12:
            yield "weight_decay", "it is so small that no number changes by it"
        if self.local_steps == 1:
            yield "proximal_mu", "the only step of a round begins where the term is 0"
        if self.physical_batch_size is None and not config.simulation.gpus_per_worker:
            yield "group_by_length", "client.physical_batch_size does not split batches"
        elif config.privacy.samples_units:
            yield "group_by_length", "a person's examples stay together (privacy.unit)"
        if self.optimizer == "sgd" and not self.momentum:
            yield "keep_optimizer_state", "sgd without momentum remembers nothing"


class ServerSection(Section):
    """``[server]``: sampling of clients, the server's optimizer, evaluation and timeouts."""

    fraction_train: Fraction = Field(
        default=1.0, description="Share of the clients that take part in a round, at least one client."
    )
    sampling: Annotated[str, AfterValidator(CLIENT_SAMPLINGS.check)] = Field(
        default="fixed",
        description="How a round's clients are drawn: a fixed number of them, or each with probability fraction_train.",
    )
    aggregator: Annotated[str, AfterValidator(AGGREGATORS.check)] = Field(
        default="mean",
        description="How the server combines the clients' updates: by their mean, or robustly against wrong updates.",
    )
    trimmed_share: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        default=0.1, description="Share of the values that trimmed-mean leaves out at each end."
    )
    malicious_clients: Annotated[int, Field(ge=0)] = Field(
        default=1, description="How many wrong clients krum and multi-krum withstand (f); they need 2 f + 3 replies."
    )
    max_update_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Largest norm of a client's update; the server shortens longer ones. No limit by default.",
    )
    optimizer: Annotated[str, AfterValidator(SERVER_OPTIMIZERS.check)] = Field(
        default="fedavg",
        description="Optimizer of the server, which steps along the clients' mean update; fedavg "
        "takes the mean itself.",
    )
    learning_rate: LearningRate | None = Field(
        default=None, description="Step size of the server's optimizer (eta); each has its own default."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="Momentum of fedavgm.")
    beta_1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Decay of the first moment of the server's optimizer."
    )
    beta_2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.99, description="Decay of the second moment of the server's optimizer."
    )
    tau: Annotated[float, Field(ge=1e-12, le=1e6)] = Field(
        default=1e-3, description="What the server's optimizer adds to the root of the second moment."
    )
    min_replies: Positive = Field(default=1, description="Minimum number of replies for a round to count.")
    evaluate_every: Positive = Field(
        default=1,
        description="Evaluate after every so many rounds, and after the last one.",
        json_schema_extra={"unit": "rounds"},
    )
    evaluate_start: bool = Field(default=True, description="Evaluate before the first round too.")
    early_stopping_patience: Positive | None = Field(
        default=None,
        description="End the run after so many evaluations in a row without improvement on data.validation; by "
        "default all rounds are run. Privacy is spent only for the rounds that were run; noise is calibrated for all "
        "of them.",
        json_schema_extra={"unit": "evaluations"},
    )
    batch_size: Count = Field(
        default=64, description="Number of examples at once in evaluation.", json_schema_extra={"unit": "examples"}
    )
    timeout: Annotated[float, Field(gt=0, le=30 * 86400)] = Field(
        default=3600.0, description="Seconds that a round waits for its replies.", json_schema_extra={"unit": "seconds"}
    )
    round_deadline: Annotated[float, Field(gt=0, le=30 * 86400)] | None = Field(
        default=None,
        description="Seconds of wall-clock time that clients have for their training in a round; the round continues "
        "without late ones. By default only timeout ends it.",
        json_schema_extra={"unit": "seconds"},
    )
    over_sampling: Annotated[float, Field(ge=1, le=100)] = Field(
        default=1.0,
        description="Factor by which a round asks more clients than fraction_train says, against stragglers. It "
        "takes only the first replies, as many as fraction_train says. In simulation these are "
        "the first in the order in which clients were drawn, so that the result does not depend on the machine.",
    )
    max_round_retries: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        default=None,
        description="How often a failed round is repeated, with clients drawn anew, before the run stops with its "
        "state saved. A round fails if too few replies arrive or their aggregate is not finite. By default the run "
        "continues with the next round.",
    )
    evaluate_clients: bool = Field(
        default=False,
        description="Evaluate the final model on every client's own examples, in simulation only: one pass over all "
        "training examples, which epsilon does not cover.",
    )

    fraction_evaluate: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="Share of the clients that evaluate the model on their own test examples whenever the server "
        "evaluates; none with 0.",
    )
    evaluate_not_covered: bool = Field(
        default=False,
        description="Allow clients to evaluate under privacy: epsilon does not cover the sums that they send.",
    )
    secure_aggregation: bool = Field(
        default=False,
        description="Let clients mask their updates, so that the server learns only the weighted sum (SecAgg+). A "
        "sum needs at least two clients.",
    )
    num_shares: Annotated[int, Field(ge=3, le=10_000)] = Field(
        default=33,
        description="With secure_aggregation, into how many shares a client's secrets are divided: one for itself, the "
        "others for its neighbours of the round; an even number counts as the next odd one. With few clients, all "
        "hold shares of each other.",
    )
    reconstruction_threshold: Annotated[float, Field(gt=0.5, le=1)] = Field(
        default=0.6,
        description="With secure_aggregation, the share of the round's clients, and of each one's neighbours, that "
        "must stay to the end. If more drop out, the round does not count.",
    )
    clipping_range: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        default=8.0,
        description="With secure_aggregation, the largest absolute value of a number in an update; a client with a "
        "larger one drops out. Numbers are rounded to about this divided by 2^31.",
    )

    FOR_CLIENTS: ClassVar[tuple[str, ...]] = (
        *("secure_aggregation", "clipping_range"),
        *("num_shares", "reconstruction_threshold", "min_replies"),
    )
    """Keys by which clients behave; real nodes ignore all others."""

    def check(self, config: Config) -> None:
        """Refuse what secure sums hide, evaluations that clients cannot give, and over-sampling of no fixed number."""
        if self.secure_aggregation:
            self._check_secure(config)
        patience = self.early_stopping_patience
        if patience is not None and config.data.validation is None:
            raise InputError("server.early_stopping_patience", patience, "looks at validation; set data.validation")
        asked = self.fraction_evaluate
        if self.over_sampling > 1 and CLIENT_SAMPLINGS.get(self.sampling).independent:
            # A sum that is closed at a number of replies also changes by the client that another one keeps out.
            remedy = (
                f"needs a fixed number of clients, which {self.sampling} does not draw; raise server.fraction_train"
            )
            raise InputError("server.over_sampling", self.over_sampling, remedy)
        if asked and config.data.client_test is None and config.data.name != NODES:
            remedy = "needs data.client_test: the share of each client's examples that it holds out"
            raise InputError("server.fraction_evaluate", asked, remedy)
        if asked and config.privacy.mode != "none" and not self.evaluate_not_covered:
            remedy = (
                "has clients answer with sums over their examples without noise, so epsilon would not cover them; "
                "set it to 0, or set server.evaluate_not_covered = true"
            )
            raise InputError("server.fraction_evaluate", asked, remedy)

    def _check_secure(self, config: Config) -> None:
        """Refuse what is no weighted sum of updates, or needs single ones."""
        wire, correction, mode = config.wire, config.client.correction, config.privacy.mode
        codec, codec_key = wire.uplink_codec or wire.codec, "uplink_codec" if wire.uplink_codec else "codec"
        lossy = codec is not None and CODECS.get(codec).lossy
        server_noise = MECHANISMS.get(mode).noise_by == "server" and config.privacy.noise == "central"
        refused: list[tuple[str, Any, bool, str]] = [
            ("server.aggregator", self.aggregator, AGGREGATORS.get(self.aggregator).robust, "use mean"),
            ("server.max_update_norm", self.max_update_norm, self.max_update_norm is not None, "leave it out"),
            (f"wire.{codec_key}", codec, lossy, "leave it out, and set wire.downlink_codec for the way down"),
            ("client.correction", correction, CORRECTIONS.get(correction).active, "use none"),
            ("server.over_sampling", self.over_sampling, self.over_sampling > 1, "set it to 1"),
            ("privacy.mode", mode, server_noise, "set privacy.noise = distributed"),
        ]
        for key, value, wrong, remedy in refused:
            if wrong:
                remedy = f"needs single clients' updates, which secure sums hide; {remedy}"
                raise InputError(key, value, f"{remedy}, or server.secure_aggregation = false")

    def unused(self, config: Config) -> Iterator[tuple[str, str]]:
        """Each optimizer reads some of its keys, and clients are evaluated in one of two ways."""
        if self.round_deadline is not None and self.round_deadline >= self.timeout:
            yield "round_deadline", f"server.timeout = {self.timeout:g} ends a round before"
        if self.over_sampling > 1 and self.fraction_train == 1:
            yield "over_sampling", "a round asks all clients as it is"
        if not self.secure_aggregation:
            yield "num_shares reconstruction_threshold clipping_range", "server.secure_aggregation is false"
        if self.evaluate_every > config.run.rounds:
            yield "evaluate_every", f"of {config.run.rounds} rounds the last is evaluated"
        if self.fraction_evaluate:
            yield "evaluate_clients", "clients evaluate on test examples of their own"
        if not self.fraction_evaluate or config.privacy.mode == "none":
            yield "evaluate_not_covered", "no client evaluates under privacy"
        for key in ("trimmed_share", "malicious_clients"):
            if key in self.model_fields_set and key not in AGGREGATORS.get(self.aggregator).uses:
                yield key, f"server.aggregator is {self.aggregator}"
        for key in ("learning_rate", "momentum", "beta_1", "beta_2", "tau"):
            # Looked up only for keys that were set: an optimizer's module imports torch.
            if key in self.model_fields_set and key not in SERVER_OPTIMIZERS.get(self.optimizer).uses:
                yield key, f"server.optimizer is {self.optimizer}"

    @property
    def round_seconds(self) -> float:
        """Seconds after which a round's training goes on without the replies that are not there."""
        return min(self.timeout, self.round_deadline or self.timeout)


class WireSection(Section):
    """``[wire]``: how the arrays of a round travel."""

    codec: Annotated[str, AfterValidator(CODECS.check)] | None = Field(
        default=None,
        description="How the arrays of a round are encoded in both directions; by default they are not rounded. "
        "Arrays that are sent once are never rounded.",
    )
    downlink_codec: Annotated[str, AfterValidator(CODECS.check)] | None = Field(
        default=None, description="How arrays sent to clients are encoded, instead of codec."
    )
    uplink_codec: Annotated[str, AfterValidator(CODECS.check)] | None = Field(
        default=None, description="How arrays sent to the server are encoded, instead of codec."
    )
    error_feedback: bool | None = Field(
        default=None,
        description="Let each client keep the error of the uplink's codec, and add it to its next update; by default "
        "only with codecs that encode updates, such as onebit and topk. Clients then send updates. A client keeps up "
        "to two numbers for each number that it sends.",
    )
    topk_fraction: Fraction = Field(
        default=0.05, description="Share of an array's numbers that topk sends: the largest, at least one."
    )

    def check(self, config: Config) -> None:
        """Refuse a codec of updates for the way down, on which values travel."""
        for key in ("downlink_codec", "codec"):
            name = getattr(self, key)
            if name is not None and CODECS.get(name).updates_only and (key != "codec" or self.downlink_codec is None):
                remedy = "encodes updates, but values go down to clients; set wire.uplink_codec"
                raise InputError(f"wire.{key}", name, remedy)

    def unused(self, config: Config) -> Iterator[tuple[str, str]]:
        """Each codec reads some of the keys; where nothing is lost, nothing is fed back."""
        both = self.downlink_codec or self.codec, self.uplink_codec or self.codec
        given = [name for name in dict.fromkeys(both) if name is not None]
        if self.codec and self.downlink_codec and self.uplink_codec:
            yield "codec", "each direction has a codec of its own"
        for key in self.model_fields_set & {"topk_fraction"}:  # codecs are looked up only for keys that were set
            if not any(key in CODECS.get(name).uses for name in given):
                yield key, f"no codec of the run reads it: {', '.join(given) or 'nothing is rounded'}"
        if self.error_feedback and not self.keeps_errors:
            yield "error_feedback", "nothing is rounded on the way to the server"

    @property
    def keeps_errors(self) -> bool:
        """Whether clients keep what the uplink's codec loses of their updates."""
        name = self.uplink_codec or self.codec
        codec = None if name is None else CODECS.get(name)
        if codec is None or not codec.lossy:
            return False
        needs: bool = codec.updates_only and not codec.unbiased
        return needs if self.error_feedback is None else self.error_feedback

    @property
    def sends_updates(self) -> bool:
        """Whether arrays go up as updates, whatever the method's table says."""
        name = self.uplink_codec or self.codec
        return self.keeps_errors or (name is not None and bool(CODECS.get(name).updates_only))
