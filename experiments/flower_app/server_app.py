"""The server's half of the app: fedsim's strategies, as the run configuration names them."""

from fedsim.flower.server_app import app

__all__ = ["app"]
