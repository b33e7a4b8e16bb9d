"""The clients' half of the app: fedsim's local rules, on the data that own_data.py loads."""

from fedsim.flower.client_app import app

__all__ = ["app"]
