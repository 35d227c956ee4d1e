"""One typed model of a run.

A run is described by a TOML file. :func:`load_config` reads it, applies overrides and returns a :class:`Config`; every
mistake becomes an :class:`~fedlora.errors.InputError` that names the key, the value and the remedy.
:meth:`Config.to_toml` writes the resolved config back; the result runs again as it is.
"""

from fedlora.config.errors import input_error, unknown_key
from fedlora.config.evaluation import EvaluationSection
from fedlora.config.examples import DataSection, ModelSection, PartitionSection
from fedlora.config.privacy import MAX_EPSILON, MAX_GROUP, MAX_NOISE, MIN_NOISE, PrivacySection
from fedlora.config.reader import load_common, load_config, override, read_config, read_toml, unused_keys
from fedlora.config.reference import Key, all_keys, find_keys, section_title
from fedlora.config.running import NetworkSection, SimulationSection, TrackingSection
from fedlora.config.schema import ANY_METHOD, Config
from fedlora.config.section import (
    NODES,
    SERVER,
    Count,
    FileFormat,
    Fraction,
    LearningRate,
    Name,
    Positive,
    Section,
    Seed,
    Share,
)
from fedlora.config.training import ClientSection, MethodSection, RunSection, ServerSection, WireSection

__all__ = [
    "ANY_METHOD",
    "MAX_EPSILON",
    "MAX_GROUP",
    "MAX_NOISE",
    "MIN_NOISE",
    "NODES",
    "SERVER",
    "ClientSection",
    "Config",
    "Count",
    "DataSection",
    "EvaluationSection",
    "FileFormat",
    "Fraction",
    "Key",
    "LearningRate",
    "MethodSection",
    "ModelSection",
    "Name",
    "NetworkSection",
    "PartitionSection",
    "Positive",
    "PrivacySection",
    "RunSection",
    "Section",
    "Seed",
    "ServerSection",
    "Share",
    "SimulationSection",
    "TrackingSection",
    "WireSection",
    "all_keys",
    "find_keys",
    "input_error",
    "load_common",
    "load_config",
    "override",
    "read_config",
    "read_toml",
    "section_title",
    "unknown_key",
    "unused_keys",
]
