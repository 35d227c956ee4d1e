"""``[model]``, ``[data]`` and ``[data.partition]``: the base model, and who holds which examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedlora.config.section import NODES, SERVER, FileFormat, Positive, Section, Seed, Share
from fedlora.errors import InputError
from fedlora.quantization import check_quantization
from fedlora.registry import CLIENT_SAMPLINGS, MECHANISMS
from fedlora.tasks import get_task, tasks

if TYPE_CHECKING:
    from fedlora.config.schema import Config


class ModelSection(Section):
    """``[model]``: the frozen base model, from ``asset:NAME``, a hub id or a folder."""

    name: Annotated[str, Field(min_length=1)] = Field(
        description="The base model: asset:NAME, a hub id, a folder, or the folder of a finished run."
    )
    task: str = Field(
        default="sequence-classification",
        description="What the model learns, such as sequence-classification, regression or causal-lm.",
    )
    pooling: Literal["default", "mean"] = Field(
        default="default", description="The classifier: the model's own head, or a new head on the mean of the tokens."
    )
    dtype: Literal["float64", "float32", "bfloat16"] = Field(
        default="float32", description="Floating-point type in which the base model is loaded."
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        default=None,
        description="Store the frozen layers in 4 bits (nf4) or 8 bits (int8) a weight, through bitsandbytes; in "
        "model.dtype by default.",
    )
    max_length: Annotated[int, Field(ge=2, le=1_000_000)] = Field(
        default=128,
        description="Longest row, in tokens; the rest of a longer example is cut off, or split by data.long_texts.",
        json_schema_extra={"unit": "tokens"},
    )
    num_hidden_layers: Positive | None = Field(
        default=None,
        description="Number of layers of the base model that are kept, from the first; all by default.",
        json_schema_extra={"unit": "layers"},
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a model on the hub; the newest by default."
    )

    def check(self, config: Config) -> None:
        """Check that there is such a task, and that the base can be quantised here."""
        get_task(self.task)
        check_quantization(config)

    def unused(self, config: Config) -> Iterator[tuple[str, str]]:
        """Each task reads keys of its own."""
        yield from _unread("model", config)


class PartitionSection(Section):
    """``[data.partition]``: how the training examples are divided among the clients (flwr-datasets' partitioners)."""

    kind: Literal["iid", "dirichlet", "pathological", "shard", "size", "natural"] = Field(
        default="iid",
        description="How examples are divided: evenly at random, by label skew (dirichlet, pathological, shard), "
        "into unequal sizes, or by the owner that a column names (natural).",
    )
    clients: Positive | None = Field(
        default=None, description="Number of clients; with kind natural, one for each value of the column."
    )
    alpha: Annotated[float, Field(ge=1e-3, le=1e6)] = Field(
        default=0.5, description="Concentration of the Dirichlet distribution: the smaller, the more clients differ."
    )
    classes_per_client: Positive = Field(
        default=2, description="Number of classes that a client has with kind pathological."
    )
    shards_per_client: Positive = Field(
        default=2, description="Number of shards of label-sorted examples that a client has with kind shard."
    )
    size_skew: Literal["linear", "square", "exponential"] = Field(
        default="linear", description="How the clients' numbers of examples grow with kind size."
    )
    column: str | None = Field(
        default=None,
        description="Column to divide by: with kind natural the owner, otherwise the column that is skewed; the "
        "label by default.",
    )
    min_examples: Positive = Field(
        default=1,
        description="Fewest examples that a client may have; a partition with fewer is refused.",
        json_schema_extra={"unit": "examples"},
    )

    def unused(self, config: Config) -> Iterator[tuple[str, str]]:
        """Each kind has keys of its own."""
        if config.data.name != NODES and self.kind == "natural":
            yield "clients", "the partition is natural: one client per value of its column"
        of_kind = {
            "dirichlet": "alpha",
            "pathological": "classes_per_client",
            "shard": "shards_per_client",
            "size": "size_skew",
        }
        for kind, key in of_kind.items():
            if self.kind != kind:
                yield key, f"the partition is {self.kind}"


class DataSection(Section):
    """``[data]``: the examples, from ``asset:NAME``, a hub id, or a CSV, TSV, JSONL, Parquet or ``datasets`` path."""

    name: Annotated[str, Field(min_length=1)] = Field(
        description='The training examples: asset:NAME, a hub id, a path, or "nodes" where real nodes hold them.'
    )
    subset: str | None = Field(
        default=None, description="Part of a data set on the hub, such as mnli of glue; for data.name alone."
    )
    format: FileFormat | None = Field(
        default=None, description="Format of the files; by default by the suffix of their names."
    )
    train: str | None = Field(
        default=None, description="Split to train on, where the data has several; train by default."
    )
    test: str | None = Field(
        default=None,
        description="Examples to test on: a split or another source; by default a seeded tenth is held out.",
    )
    validation: str | Share | None = Field(
        default=None,
        description="Examples by which the best round and tuned values are chosen: a split, another source, or a "
        "share of the training examples; none by default.",
    )
    client_test: str | Share | None = Field(
        default=None,
        description="Share of each client's examples that it tests on instead of training on them; none by default. "
        "Real nodes have their own test examples.",
    )
    public: str | Share | None = Field(
        default=None,
        description="Examples that the server may read: a split, another source, or a share of the training "
        "examples, taken from the clients; none by default.",
    )
    text: str = Field(default="text", description="Column of the texts.")
    text_pair: str | None = Field(default=None, description="Column of the second text of each pair; none by default.")
    label: str = Field(default="label", description="Column of the labels, which are words or numbers.")
    label_names: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)] | None = Field(
        default=None,
        description="Names of the classes, in order; by default those of the training examples, or of the test set "
        "with nodes.",
    )
    prompt: str | None = Field(default=None, description="Column of a language model's prompts, which have no loss.")
    answer: str | None = Field(
        default=None,
        description="Column of a language model's answers, which have the loss; by default the first of "
        "data.choices, if that is given.",
    )
    messages: str | None = Field(
        default=None,
        description="Column of conversations, lists of {role, content} with the roles system, user and assistant; the "
        "loss is on all turns of the assistant.",
    )
    template: bool | None = Field(
        default=None,
        description="Put examples through the tokenizer's chat template: messages always, prompt and answer only with "
        "true, as one turn of the user and one of the assistant.",
    )
    choices: str | None = Field(
        default=None,
        description="Column of lists of answers to choose from, for evaluation.kind = choice. The right one is the "
        "answer (with messages the assistant's last turn); without data.answer it is the first.",
    )
    long_texts: Literal["cut", "split"] = Field(
        default="cut",
        description="What happens to a language model's examples that are longer than model.max_length: they are "
        "cut, or split into several rows, each of which counts as an example.",
    )
    packing: bool = Field(
        default=False,
        description="Put several examples of a language model's batch into one row of at most model.max_length tokens; "
        "batches and results are the same, with less padding. Not with example-level privacy.",
    )
    seed: Seed | None = Field(
        default=None,
        description="Seed by which examples are held out and subsets are drawn, so that runs of several seeds can "
        "share a test set; run.seed by default.",
    )
    max_examples: Positive | None = Field(
        default=None,
        description="Maximum number of training examples, drawn at random; all by default.",
        json_schema_extra={"unit": "examples"},
    )
    max_test_examples: Positive | None = Field(
        default=None,
        description="Maximum number of test examples, drawn at random; all by default.",
        json_schema_extra={"unit": "examples"},
    )
    partition: PartitionSection = Field(
        default=PartitionSection(), description="How the training examples are divided among the clients."
    )

    def check(self, config: Config) -> None:
        """Check names of classes, what nodes cannot give, the partition, and prompts."""
        if self.label_names is not None and len(set(self.label_names)) < len(self.label_names):
            raise InputError("data.label_names", self.label_names, "names a class twice; remove one of them")
        if self.name == NODES and self.test is None:
            remedy = "is required with data.name = nodes: the examples that the server tests on"
            raise InputError("data.test", None, remedy)
        for key in ("validation", "public"):
            if self.name == NODES and isinstance(share := getattr(self, key), float):
                remedy = "is a share of the training examples, which nodes keep; name a file"
                raise InputError(f"data.{key}", share, remedy)
        if isinstance(self.client_test, str) and self.test != SERVER:
            remedy = "is no share of each client's examples; give a number between 0 and 1"
            raise InputError("data.client_test", self.client_test, remedy)
        self._check_partition(config)
        self._check_answers()
        self._check_rows(config)
        skewed = self.partition.kind in ("dirichlet", "pathological", "shard")
        task = get_task(config.model.task)
        if not task.one_class and skewed and self.partition.column is None:
            remedy = f"is required with kind {self.partition.kind} for {task.name}: the column to skew"
            raise InputError("data.partition.column", None, remedy)

    def _check_answers(self) -> None:
        """Check what a language model's examples are made of: text, prompt and answer, or messages."""
        given = self.answer if self.answer is not None else self.choices
        if self.messages is not None and (self.prompt is not None or self.answer is not None):
            remedy = "holds whole conversations; remove data.prompt and data.answer, or this key"
            raise InputError("data.messages", self.messages, remedy)
        if self.messages is not None and self.template is False:
            remedy = "messages need a chat template; remove the key, or name data.prompt and data.answer instead"
            raise InputError("data.template", False, remedy)
        if self.messages is None and (self.prompt is None) != (given is None):
            remedy = "give prompt and answer (or choices) together, or neither for plain text"
            raise InputError("data.prompt", self.prompt, remedy)

    def _check_rows(self, config: Config) -> None:
        """Check what a language model's rows are made of."""
        task, mode = get_task(config.model.task), config.privacy.mode
        if task.splits and self.name == NODES and self.long_texts == "split":
            remedy = "is not done by nodes: their numbers of rows would reveal how long texts are; set it to cut"
            raise InputError("data.long_texts", "split", remedy)
        if task.packs and self.packing and MECHANISMS.made(mode).clips_examples:
            remedy = f"mode {mode} clips the gradient of each row; remove it, or set privacy.mode = none"
            raise InputError("data.packing", True, remedy)

    @property
    def templated(self) -> bool:
        """Whether examples go through the tokenizer's chat template."""
        return self.messages is not None or (self.prompt is not None and self.template is True)

    def _check_partition(self, config: Config) -> None:
        partition, server = self.partition, config.server
        if self.name == NODES and partition.clients is None:
            return  # there are as many clients as nodes
        if partition.kind == "natural":
            if partition.column is None:
                remedy = "is required with kind natural: the column that names the owner"
                raise InputError("data.partition.column", None, remedy)
        elif partition.clients is None:
            raise InputError("data.partition.clients", None, "is required: the number of clients")
        else:
            asked = CLIENT_SAMPLINGS.made(server.sampling).most(partition.clients, server.fraction_train)
            if server.min_replies > asked:
                remedy = f"can never be reached: a round asks {asked} clients; lower it or raise server.fraction_train"
                raise InputError("server.min_replies", server.min_replies, remedy)

    def unused(self, config: Config) -> Iterator[tuple[str, str]]:
        """Each task, and each partition, has keys of its own."""
        yield from _unread("data", config)
        if self.name == NODES:
            yield "client_test", "nodes hold test examples of their own"
        if self.messages is None and self.prompt is None:
            yield "template", "examples are plain text"
        if config.evaluation.kind != "choice" and (self.messages is not None or self.answer is not None):
            yield "choices", f"evaluation.kind is {config.evaluation.kind}"
        for keys, why in self.partition.unused(config):
            yield f"partition.{keys}", why


def _unread(section: str, config: Config) -> Iterator[tuple[str, str]]:
    """Name the keys of a section that other tasks read, and this one does not."""
    of_any = {key for task in tasks().values() for key in task.keys}
    for key in sorted(of_any - set(get_task(config.model.task).keys)):
        if key.startswith(f"{section}."):
            yield key.removeprefix(f"{section}."), f"model.task is {config.model.task}"
