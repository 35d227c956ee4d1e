"""The client half: one Flower ClientApp, used by simulation and by real nodes alike."""
