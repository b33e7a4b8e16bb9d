"""What fedsim costs beside a hand-written PyTorch loop on the same tensors; see README.md."""
