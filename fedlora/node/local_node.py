"""A data owner's node in its worker: the node's data, policy and ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config import SERVER, Config, ServerSection
from fedlora.errors import InputError, PolicyError
from fedlora.node.config import NodeConfig, load_node
from fedlora.node.node_ledger import NodeLedger
from fedlora.node.policy import admitted_model, check_policy
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
        return cls(config, NodeLedger(config.directory, config.policy))

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
            If the owner does not list the model (:func:`~fedlora.node.policy.admitted_model`), or the task needs
            classes and the server names none: the node would have to reveal those of its file.
        """
        own = self.config.data
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
        # A node ignores how the server samples clients, evaluates, simulates and logs.
        server = content.pop("server")
        content["server"] = {key: server[key] for key in ServerSection.FOR_CLIENTS}
        for section in ("evaluation", "simulation", "network", "tracking"):
            content.pop(section)
        return Config.model_validate(content)

    def admit(self, run: Config, examples: int) -> PrivacyPlan | None:
        """Plan a run's privacy with the node's number of examples, and check it against the owner's policy.

        Returns
        -------
        PrivacyPlan or None
            None without privacy.

        Raises
        ------
        PolicyError, InputError
        """
        policy = self.config.policy
        if policy.max_epsilon is not None and policy.delta >= 1 / examples:
            remedy = f"must be below 1 / n = {1 / examples:.3g} for {examples} examples; lower it"
            raise InputError("policy.delta", policy.delta, remedy)
        if policy.require_secure_aggregation and not run.server.secure_aggregation:
            raise PolicyError("require_secure_aggregation", True, "server.secure_aggregation = false")
        plan = mechanism_of(run).plan(run, examples)
        check_policy(policy, plan, run.privacy.mode)
        return plan
