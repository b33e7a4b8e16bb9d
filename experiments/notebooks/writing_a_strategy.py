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
# # Writing a strategy
#
# A strategy is plain state and event handlers. It says who works when (`start`, `settle`), and what the server makes
# of a result (`on_reply`); the client's half is a local rule, `LocalSGD` unless you write another one. Here we write
# a small asynchronous method in this notebook, hold it against a method it must agree with, and train it on worker
# processes.

# %%
import torch

import fedsim
from fedsim.pool.ray import RayPool
from fedsim.strategies.fedasync import FedAsync
from fedsim.system.compute import Lognormal

# %% [markdown]
# ## The idea
#
# FedAsync mixes every client's model into the server's with a weight that falls with the staleness. Our variation
# looks at how far the two models are apart instead: with $\Delta = x_i - x$,
#
# $$x \leftarrow x + \frac{\alpha}{1 + \lVert\Delta\rVert / r}\,\Delta .$$
#
# A large disagreement with what the server believes by now counts for less; for $r \to \infty$ it is a fixed weight
# $\alpha$, which is FedAsync with a constant law: there we have something to test against.


# %%
class Cautious(fedsim.Asynchronous):
    """x <- x + alpha / (1 + ||x_i - x|| / radius) (x_i - x) at every arrival."""

    def __init__(self, local=None, alpha=0.6, radius=1.0, concurrency=None):
        local = local or fedsim.LocalSGD()
        super().__init__(local.replace(sends="model"), concurrency)  # the client's model travels up, not its change
        self.alpha = fedsim.number("alpha", alpha, above=0, most=1)
        self.radius = fedsim.number("radius", radius, above=0)

    def on_reply(self, fed, reply):
        difference = reply["model"] - fed.model
        weight = self.alpha / (1 + float(difference.norm()) / self.radius)
        fed.publish(fed.model + weight * difference, used=[reply])


# %% [markdown]
# `Asynchronous` keeps `concurrency` clients at work; `publish` makes a new version of the model out of the results in
# `used`. Settings go through `fedsim.number` and its like, so that a wrong one comes back as one clear line:

# %%
try:
    Cautious(radius=-1)
except fedsim.ConfigError as error:
    print(error)


# %% [markdown]
# ## Try it on a problem with a known answer
#
# `Quadratic` gives every client a bowl of its own, so the optimum is known and gradients are exact: a few
# thousand updates take a second.


# %%
def on_bowls(strategy, rounds=200):
    return fedsim.simulate(
        strategy,
        problem=fedsim.Quadratic(),
        system=fedsim.System(compute=Lognormal(mean=0.1, sigma=1.0)),
        stop=fedsim.Stop(rounds=rounds),
        clients=20,
        cohort=5,
        eval_every=10,
    )


rule = fedsim.LocalSGD(lr=0.05, steps=5)
for radius in (1.0, 10.0, 1e9):
    run = on_bowls(Cautious(rule, radius=radius))
    print(f"radius {radius:<6g} squared distance to the optimum {run.metrics['distance'].iloc[-1]:.4f}")

# %% [markdown]
# For a huge radius the method must be FedAsync with a constant weight and without a proximal term: same devices, same
# order of arrivals, same models.

# %%
ours = on_bowls(Cautious(rule, radius=1e300))
theirs = on_bowls(FedAsync(rule, staleness="constant", rho=0.0))
assert ours.manifest["events_sha256"] == theirs.manifest["events_sha256"], "another schedule"
for name in ours.model:
    torch.testing.assert_close(ours.model[name], theirs.model[name], rtol=0, atol=1e-12)
print("agrees with FedAsync")

# %% [markdown]
# ## Real images, and worker processes
#
# The class lives in this notebook, and yet it can train on a Ray pool: it travels with what it needs. Where training
# runs does not show in the results.


# %%
def on_images(pool):
    return fedsim.simulate(
        Cautious(fedsim.LocalSGD(lr=0.1, batch_size=50), radius=5.0),
        system=fedsim.System(compute=Lognormal(mean=0.1, sigma=1.0)),
        pool=pool,
        stop=fedsim.Stop(rounds=20),
        clients=50,
        eval_every=5,
    )


here = on_images(None)
elsewhere = on_images(RayPool(workers=2))
assert here.manifest["model_sha256"] == elsewhere.manifest["model_sha256"]
print(here.metrics[["round", "time", "accuracy"]].to_string(index=False))
assert here.metrics["accuracy"].iloc[-1] > 0.6  # chance is 0.1

# %% [markdown]
# ## From here to the command line
#
# Put the class into `cautious.py` and its settings into `cautious.yaml` beside it,
#
# ```yaml
# # Models that are far from the server's count for less
# _target_: cautious.Cautious
# alpha: 0.6  # weight of a model that equals the server's
# radius: 1.0  # distance at which the weight is halved
# concurrency: null  # tasks in flight; null is the cohort
# ```
#
# and in that folder `fedsim run -m strategy=cautious,fedasync strategy.alpha=0.3,0.6 seed=0,1,2` sweeps over it.
