"""Flower: the same strategy on a real federation, and Flower's apps in virtual time (``simulated``).

A :class:`~fedsim.flower.deployment.Deployment` is the engine of the simulator on a real clock: what the simulator's
models plan, here the nodes of a Flower ``Grid`` tell.
"""
