"""The PyTorch tree that makes the regularised multiview model."""
