"""The ``ServerApp`` of a deployment: ``fedsim.flower.server_app:app``."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the configuration says on the nodes there are."""
    from fedsim.flower.configuration import read_run_config
    from fedsim.flower.deploying import deploy
    from fedsim.progress import ended

    print(ended(deploy(grid, read_run_config(context.run_config))), flush=True)
