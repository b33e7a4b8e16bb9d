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
# # First steps in Python
#
# One federation from its parts to a curve: what is learnt, on which devices, by which method, for how long. Time is
# virtual: it follows from the devices' models, not from how fast this machine is.

# %%
import matplotlib.pyplot as plt

import fedsim
from fedsim import plots
from fedsim.data.partitions import Dirichlet
from fedsim.strategies.fedavg import FedAvg
from fedsim.system.compute import Lognormal
from fedsim.system.network import Lognormal as Links

# %% [markdown]
# ## The parts
#
# * **Problem**: images of clothes that travel with fedsim, spread over the clients by Dirichlet(0.3) over the labels.
# * **System**: seconds per local step are log-normal, and so are bandwidths.
# * **Strategy**: FedAvg; every client of a round makes one pass over its data, in batches of 10, at rate 0.1.
# * **Stop**: 20 rounds, each of 10 clients out of 100.


# %%
def first(seed):
    return fedsim.simulate(
        strategy=FedAvg(fedsim.LocalSGD(lr=0.1, batch_size=10, epochs=1)),
        problem=fedsim.Classification(partition=Dirichlet(alpha=0.3)),
        system=fedsim.System(compute=Lognormal(mean=0.1, sigma=1.0), network=Links()),
        stop=fedsim.Stop(rounds=20),
        clients=100,
        cohort=10,
        seed=seed,
    )


run = first(seed=0)
run.summary

# %% [markdown]
# ## What a run leaves
#
# Tables are pandas frames. `metrics` has a row per evaluation, `events` a row per task of a client, `clients` a row
# per client. Times are virtual seconds, sizes are bytes.

# %%
run.metrics[["round", "time", "updates", "up_bytes", "loss", "accuracy"]].tail()

# %%
run.events[["client", "dispatched", "started", "computed", "arrived", "steps", "staleness", "outcome"]].head()

# %% [markdown]
# The clients are unlike in what they hold and in how fast they are.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
plots.partition(run, ax=left)
right.hist(run.clients["seconds_per_step"], bins=30, color=plots.COLOURS[0])
right.set(xlabel="seconds per local step", ylabel="clients")
plt.show()

# %% [markdown]
# FedAvg waits in every round for the slowest of its ten clients: a round lasts as long as its longest task.

# %%
tasks = run.events[run.events["outcome"] == "applied"]
longest = (tasks["arrived"] - tasks["dispatched"]).groupby(tasks["version"]).max()
assert abs(longest.sum() - run.summary["time"]) < 1e-6 * run.summary["time"]
print(f"mean task {(tasks['arrived'] - tasks['dispatched']).mean():.1f} s, mean round {longest.mean():.1f} s")

# %% [markdown]
# ## A curve
#
# One run says little; three seeds give a band. Runs under one label are averaged.

# %%
runs = [run, first(seed=1), first(seed=2)]
figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
plots.metric_against_time({"FedAvg": runs}, ax=axes[0])
plots.metric_against_bytes({"FedAvg": runs}, ax=axes[1])
plt.show()

# %% [markdown]
# ## The same bits
#
# A run is a function of its configuration and seed. Whoever runs this cell gets the same hashes as in the first run,
# on this machine and on others with the same versions and instruction set.

# %%
again = first(seed=0)
assert again.manifest["model_sha256"] == run.manifest["model_sha256"]
assert again.manifest["events_sha256"] == run.manifest["events_sha256"]
print(again.manifest["model_sha256"][:16], again.manifest["events_sha256"][:16])

# %% [markdown]
# With `out="runs/mine"` a run writes its tables, model and manifest to a directory, saves itself every minute and can
# be resumed; `fedsim report` and `fedsim.plots` read such directories.
