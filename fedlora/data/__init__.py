"""Where examples come from, who holds which of them, and how they become tokens."""
