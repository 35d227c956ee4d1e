"""Figures: what one shows, apart from how it is drawn. Nothing here imports matplotlib before something is drawn."""
