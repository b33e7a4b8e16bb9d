"""FedAU and its baselines when participation depends on labels."""
