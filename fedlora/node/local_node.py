"""A data owner's node in its worker: the node's data, policy and ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config import SERVER, Config, ServerSection
from fedlora.errors import InputError, PolicyError
from fedlora.node.config import NodeConfig, load_node
from fedlora.node.node_ledger import NodeLedger
from fedlora.node.policy import Release, admitted_model, check_policy, update_charge
from fedlora.privacy import PrivacyPlan
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.tasks import get_task


@dataclass(frozen=True)
class LocalNode:
    """A data owner's node.

    Attributes
    ----------
    config : NodeConfig
    ledger : NodeLedger
    """

    config: NodeConfig
    ledger: NodeLedger

    @classmethod
    def open(cls, path: str | Path) -> LocalNode:
        """Read node.toml. Every message reads it again, so that the owner's changes take effect at once.

        Raises
        ------
        InputError
            If the file or the ledger cannot be used.
        """
        config = load_node(path)
        return cls(config, NodeLedger(config.directory, config.policy, config.data.unit))

    def own_config(self, run: Config, label_names: list[str] | None) -> Config:
        """Return a run's config with the owner's data in place of its own.

        ``[data] test`` gives the test examples. The model is loaded as the owner lists it.

        Parameters
        ----------
        run : Config
            As the server sends it.
        label_names : list of str, optional
            The run's classes, as the server describes them.

        Raises
        ------
        PolicyError, InputError
            If the owner does not list the model (:func:`~fedlora.node.policy.admitted_model`), the run protects persons
            and the owner names none, or the other way round, or the task needs classes and the server names none: the
            node would have to reveal those of its file.
        """
        own = self.config.data
        if run.privacy.mode == "example" and (run.privacy.unit is None) != (own.unit is None):
            raise PolicyError("unit", own.unit is not None, f"privacy.unit = {run.privacy.unit}")
        if label_names is None and get_task(run.model.task).classes:
            raise InputError("data.label_names", None, "must be named by the server")
        model = admitted_model(self.config.policy, run.model)
        content: dict[str, Any] = run.model_copy(update={"model": model}).model_dump(exclude_none=True)
        content["data"] = {
            "name": own.path,
            "format": self.config.format,
            "text": own.text,
            "label": own.label,
            "test": SERVER,
            "partition": {"kind": "iid", "clients": 1},
            "packing": run.data.packing,
        }
        if label_names is not None:
            content["data"]["label_names"] = label_names
        if own.test is not None:
            content["data"]["client_test"] = own.test
        if own.text_pair is not None:
            content["data"]["text_pair"] = own.text_pair
        if own.prompt is not None:
            content["data"] |= {"prompt": own.prompt, "answer": own.answer, "template": run.data.templated}
        if own.messages is not None:
            content["data"]["messages"] = own.messages
        content["privacy"] |= {"unit": own.unit}
        # A node ignores how the server samples clients, evaluates, simulates and logs.
        server = content.pop("server")
        content["server"] = {key: server[key] for key in ServerSection.FOR_CLIENTS}
        for section in ("evaluation", "simulation", "network", "tracking"):
            content.pop(section)
        return Config.model_validate(content)

    def admit(self, run: Config, examples: int, units: int | None = None) -> PrivacyPlan | None:
        """Plan a run's privacy with the node's number of examples or persons, and check it against the owner's policy.

        Returns
        -------
        PrivacyPlan or None
            None without privacy.

        Raises
        ------
        PolicyError, InputError
        """
        policy, protected = self.config.policy, examples if units is None else units
        if policy.max_epsilon is not None and policy.delta >= 1 / protected:
            what = "examples" if self.config.data.unit is None else "persons"
            remedy = f"must be below 1 / n = {1 / protected:.3g} for {protected} {what}; lower it"
            raise InputError("policy.delta", policy.delta, remedy)
        if policy.require_secure_aggregation and not run.server.secure_aggregation:
            raise PolicyError("require_secure_aggregation", True, "server.secure_aggregation = false")
        plan = mechanism_of(run).plan(run, examples, units)
        check_policy(policy, run, plan, self.update_charge(run))
        return plan

    def update_charge(self, run: Config) -> Release | None:
        """Return what a noisy update of a run adds to the ledger (:func:`~fedlora.node.policy.update_charge`)."""
        return update_charge(self.config.policy, run)
