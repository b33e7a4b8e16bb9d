"""The Hydra configuration: one folder per group, one file per choice. Installed as ``fedsim.conf``."""
