# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From simulation to a Flower deployment
#
# The strategy that was simulated is the one that is deployed: the same object, the same local rule, the same records.
# Here we simulate two rounds of FedAvg on two clients, run the same overrides on a real Flower federation (one
# superlink and two supernodes, as processes on this machine), and lay the two beside each other.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from fedsim import plots

folder = Path(tempfile.mkdtemp())
overrides = [
    "strategy=fedavg",
    "clients=2",
    "cohort=2",
    "rounds=2",
    "data=digits",
    "model=logistic",
    "compute.mean=0.01",
]


def fedsim(*words):
    """The command line, as in a terminal."""
    command = [sys.executable, "-m", "fedsim.cli", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    print(done.stdout[-600:], done.stderr[-600:])
    done.check_returncode()


# %% [markdown]
# ## The simulation
#
# Seconds are virtual: what the models of `compute` and `network` say.

# %%
fedsim("run", *overrides, "out=simulated")

# %% [markdown]
# ## The deployment
#
# `fedsim deploy --local 2` starts superlink and supernodes, runs the same configuration on them and stops them again;
# without `--local` it prints the commands to paste on machines of your own. Seconds are real now. Flower starts a fresh
# Python for every message, so a round takes many of them, however small the model is.

# %%
fedsim("deploy", *overrides, "out=deployed", "--local", "2")

# %% [markdown]
# ## The same mathematics
#
# At full participation nothing depends on who is faster, so the two models are the same to the last digits.

# %%
simulated, deployed = (load_file(folder / name / "model.safetensors") for name in ("simulated", "deployed"))
for name, tensor in simulated.items():
    np.testing.assert_allclose(deployed[name], tensor, rtol=0, atol=1e-6)
print("largest difference:", max(float(np.abs(deployed[name] - simulated[name]).max()) for name in simulated))

# %% [markdown]
# ## Another clock
#
# The tables are the same ones; the manifest says which clock their seconds are from.

# %%
columns = ["client", "dispatched", "started", "computed", "arrived", "version", "steps", "outcome"]
tasks = {name: pd.read_parquet(folder / name / "events.parquet")[columns] for name in ("simulated", "deployed")}
tasks["deployed"].round(2)

# %%
used = {name: table[table["outcome"] == "applied"] for name, table in tasks.items()}
together = used["simulated"].merge(used["deployed"], on=["client", "version"], suffixes=("", "_deployed"))
assert len(together) == len(used["simulated"]) == len(used["deployed"]) == 4
assert (together["steps"] == together["steps_deployed"]).all()

# %% [markdown]
# A task of a deployment is mostly waiting: Flower's way to the node and back. How much of it was local work is measured
# at the node, and is what `compute` should say if the simulation is to predict this machine.

# %%
work = (together["computed_deployed"] - together["started_deployed"]) / together["steps"]
whole = together["arrived_deployed"] - together["dispatched_deployed"]
print(f"{work.mean() * 1000:.2f} ms per local step; a task takes {whole.mean():.1f} s in all")

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 2.2), layout="constrained")
for ax, name in zip(axes, ("simulated", "deployed"), strict=True):
    plots.client_timeline(folder / name, ax=ax)
    ax.set_title(name, fontsize=8)
plt.show()

# %% [markdown]
# `fedsim report simulated deployed` puts both into one table, and keeps them apart, for their clocks differ.
