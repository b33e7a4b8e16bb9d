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
# # Anatomy of an asynchronous run
#
# FedBuff keeps a number of clients at work and makes a new model whenever its buffer is full. Here we take one run
# apart: who did what when, how old the results were, who was heard, and what was lost.

# %%
import matplotlib.pyplot as plt
import numpy as np

import fedsim
from fedsim import plots
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system.availability import Markov
from fedsim.system.compute import Exponential
from fedsim.system.faults import Faults
from fedsim.system.network import Constant as Links

CONCURRENCY, BUFFER = 12, 4

run = fedsim.simulate(
    FedBuff(fedsim.LocalSGD(lr=0.1, batch_size=10), buffer_size=BUFFER, concurrency=CONCURRENCY),
    system=fedsim.System(
        compute=Exponential(mean=0.2, jitter=0.3),
        network=Links(down=5.0, up=1.0),
        availability=Markov(up=300.0, down=60.0),
        faults=Faults(dropout=0.05, on_offline="lose"),
    ),
    stop=fedsim.Stop(rounds=30),
    clients=40,
    cohort=12,
    eval_every=3,
    seed=3,
)
events = run.events
events["outcome"].value_counts()

# %% [markdown]
# ## Who did what when
#
# A row per client: download, local work, upload; a cross where a task was lost. The marks above are the server's
# versions.

# %%
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
plots.client_timeline(run, ax=ax)
plt.show()

# %% [markdown]
# Nobody has two tasks at a time. A task that was lost has no arrival; its last known time is where its trace ends.

# %%
times = ["dispatched", "started", "computed", "upload_started", "arrived"]
events["last_seen"] = events[times].max(axis=1)
for _, mine in events.sort_values("dispatched").groupby("client"):
    assert (mine["dispatched"].to_numpy()[1:] >= mine["last_seen"].to_numpy()[:-1]).all()
moments = np.linspace(0.1, 0.9, 200) * run.summary["time"]
at_work = np.array([events["dispatched"].le(now).sum() - events["last_seen"].le(now).sum() for now in moments])
print(f"known to be at work: {at_work.mean():.2f} on average, at most {at_work.max()} of {CONCURRENCY}")
assert at_work.max() <= CONCURRENCY

# %% [markdown]
# ## How old the results were
#
# Staleness counts the versions made between a task's start and its use. With $M$ tasks in flight and a buffer of $K$
# a result has waited through $M / K$ versions on average, less what is lost.

# %%
figure, ax = plt.subplots(figsize=(3.5, 2.4), layout="constrained")
plots.staleness(run, ax=ax)
plt.show()
mean = events.loc[events["outcome"] == "applied", "staleness"].mean()
print(f"mean staleness {mean:.2f}; M / K = {CONCURRENCY / BUFFER:.2f}")
assert abs(mean - CONCURRENCY / BUFFER) < 0.8

# %% [markdown]
# A published version uses exactly a full buffer.

# %%
applied = events[events["outcome"] == "applied"]
assert (applied.groupby("applied_version").size() == BUFFER).all()

# %% [markdown]
# ## Who was heard
#
# Fast clients come back more often, so an asynchronous server hears them more: its objective is not the one that
# FedAvg has. (`FedBuff(weighting="samples")` corrects for it, `FedAU` does so for unknown presence.)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
plots.participation(run, ax=left)
right.loglog(run.clients["seconds_per_step"], run.clients["applied"].clip(lower=0.5), "o", color=plots.COLOURS[0])
right.set(xlabel="seconds per local step", ylabel="results used")
plt.show()
slow = run.clients["seconds_per_step"] > run.clients["seconds_per_step"].median()
print("results used of the slower half:", int(run.clients.loc[slow, "applied"].sum()), "of", len(applied))
assert run.clients.loc[slow, "applied"].sum() < 0.5 * len(applied)

# %% [markdown]
# ## What it moved
#
# Every task that began downloads the model, and every result that arrived was uploaded; the totals in `metrics` are the
# sums of what the events say, to the byte.

# %%
assert events["up_bytes"].sum() == run.summary["up_bytes"]
assert events["down_bytes"].sum() == run.summary["down_bytes"]
used = applied["up_bytes"].sum() / events["up_bytes"].sum()
print(f"{run.summary['up_bytes'] / 1e6:.0f} MB up, of which {used:.1%} were used")
