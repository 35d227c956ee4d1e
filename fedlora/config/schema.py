"""The whole config: its sections, and the options of the method that it names."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import tomli_w
from pydantic import SerializeAsAny, ValidationInfo, ValidatorFunctionWrapHandler, field_validator

from fedlora.config.evaluation import EvaluationSection
from fedlora.config.examples import DataSection, ModelSection
from fedlora.config.privacy import PrivacySection
from fedlora.config.running import NetworkSection, SimulationSection, TrackingSection
from fedlora.config.section import Section
from fedlora.config.training import ClientSection, MethodSection, RunSection, ServerSection, WireSection

COMMON_KEYS = "common keys"
"""Context of validation: of ``[method]`` only what all methods share; the method's package is not imported."""
ANY_METHOD = "any method"
"""Context of validation: a method that is not installed here may have any keys, for reading what a run left."""


class Config(Section):
    """A whole run. ``fedlora config`` describes the keys of every section."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    method: SerializeAsAny[MethodSection]
    client: ClientSection = ClientSection()
    privacy: PrivacySection = PrivacySection()
    server: ServerSection = ServerSection()
    evaluation: EvaluationSection = EvaluationSection()
    wire: WireSection = WireSection()
    simulation: SimulationSection = SimulationSection()
    network: NetworkSection = NetworkSection()
    tracking: TrackingSection = TrackingSection()

    @field_validator("method", mode="wrap")
    @classmethod
    def _with_options(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> MethodSection:
        """Read ``[method]`` as the options of the method that it names."""
        if not isinstance(value, Mapping):
            return handler(value)
        common: MethodSection = handler({key: value[key] for key in value if key in MethodSection.model_fields})
        if info.context == COMMON_KEYS:
            return common
        # Methods import the config; they are looked up by name, when a config names one.
        from fedlora.methods import read_options

        return read_options(common.name, value, installed=info.context != ANY_METHOD)

    def to_toml(self) -> str:
        """Return the config as TOML; keys without a value are left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    @classmethod
    def from_toml(cls, text: str) -> Config:
        """Undo :meth:`to_toml`, wherever the run was: what was checked once is not checked again."""
        return cls.model_validate(tomllib.loads(text), context=ANY_METHOD)

    def scaling(self) -> float:
        """Return the adapter's factor s = alpha / rank (alpha defaults to the rank, so that s = 1)."""
        return 1.0 if self.method.alpha is None else self.method.alpha / self.method.rank
