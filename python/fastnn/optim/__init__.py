"""torch.optim optimizers whose step is one call into C++."""
