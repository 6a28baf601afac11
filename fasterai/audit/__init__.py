"""Who pays for sparsity: which layers can give, and which classes lose."""
