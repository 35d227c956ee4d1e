"""The server half: one Flower Strategy a file; :func:`fedlora.methods.get_method` finds them by name."""
