"""Real client nodes: Flower's SuperLink and SuperNodes, supervised; keys for them; runs on them."""
