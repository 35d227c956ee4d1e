"""Real nodes: supervise Flower's SuperLink and SuperNodes, make their keys, and submit runs to them."""
