"""One file per method. Installed as ``fedsim.strategies``; fedsim itself never imports it."""
