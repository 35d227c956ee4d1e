"""A data owner's node: its config, its policy, its ledger, and the worker that stays while messages come and go."""
