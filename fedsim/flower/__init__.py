"""fedsim and Flower: what joins the two."""
