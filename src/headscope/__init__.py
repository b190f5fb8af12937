"""Headscope: see what every attention head of a transformer is doing while it trains."""

__version__ = "0.1.0"
