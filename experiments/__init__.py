"""Configs, studies and scripts that ship with fedlora."""
