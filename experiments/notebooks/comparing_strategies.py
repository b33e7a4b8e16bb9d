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
# # Comparing strategies in virtual time
#
# Which method reaches a target first, when some clients are thirty times slower than others? Rounds do not answer
# that; seconds do. Every method meets the same devices and the same data: both are keyed by the seed, not by who asks.

# %%
import matplotlib.pyplot as plt
import pandas as pd

import fedsim
from fedsim import plots
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system.compute import Lognormal

# %% [markdown]
# A strategy object serves one run and holds its state, so we write down how to make them. FedAvg asks 10 clients at
# a time and waits for all of them; the others keep 10 at work and use results as they come, FedBuff five at a time.

# %%
methods = {
    "FedAvg": lambda rule: FedAvg(rule),
    "FedAvg, first 10 of 15": lambda rule: FedAvg(rule, over_selection=1.5),
    "FedAsync": lambda rule: FedAsync(rule),
    "FedBuff": lambda rule: FedBuff(rule, buffer_size=5),
}


def simulate(method, seed, rounds=25):
    return fedsim.simulate(
        methods[method](fedsim.LocalSGD(lr=0.1, batch_size=10)),
        system=fedsim.System(compute=Lognormal(mean=0.1, sigma=1.2)),
        stop=fedsim.Stop(rounds=rounds),
        seed=seed,
    )


seeds = (0, 1, 2)
runs = {method: [simulate(method, seed) for seed in seeds] for method in methods}

# %% [markdown]
# A **round** is ten results received, in every mode: all methods have used the same client work. Over-selection is the
# exception, for it throws work away.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
plots.metric_against_time(runs, ax=left)
plots.metric_against_rounds(runs, ax=right)
right.set_ylabel("")
right.legend(fontsize=7, frameon=False)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Time to a target, pair by pair
#
# Targets are judged on validation samples; test accuracy is only reported. Seeds differ a lot in how hard they are, but
# all methods share them: the difference within a seed is what counts.

# %%
TARGET = 0.65


def seconds_to_target(run):
    reached = run.metrics[run.metrics["val_accuracy"] >= TARGET]
    return reached["time"].iloc[0] if len(reached) else float("nan")


times = pd.DataFrame({method: [seconds_to_target(run) for run in runs[method]] for method in methods}, index=seeds)
times.index.name = "seed"
times.round(1)

# %%
(times.drop(columns="FedAvg").sub(times["FedAvg"], axis=0)).round(1)

# %% [markdown]
# The asynchronous methods need less time than FedAvg on every seed; how far that carries depends on the spread of the
# speeds (`sigma`): try 0.

# %%
assert (times["FedBuff"] < times["FedAvg"]).all()

# %% [markdown]
# ## What it costs
#
# Stale updates and wasted work do not show in a curve; the events tell.

# %%
costs = {
    method: {
        "mean staleness": pd.concat([run.events for run in group])["staleness"].mean(),
        "tasks that nobody used": sum((run.events["outcome"] != "applied").sum() for run in group) / len(group),
        "MB moved": sum(run.summary["up_bytes"] + run.summary["down_bytes"] for run in group) / len(group) / 1e6,
        "virtual seconds": sum(run.summary["time"] for run in group) / len(group),
    }
    for method, group in runs.items()
}
pd.DataFrame(costs).T.round(2)

# %% [markdown]
# The same from the command line, with the runs kept on disk, in parallel, and with a table and a figure at the end:
#
#     fedsim run -m strategy=fedavg,fedasync,fedbuff seed=0,1,2 compute.sigma=1.2 rounds=25 out=runs/compare
#     fedsim report runs/compare --target 0.65
