"""Remove what is zero: cut the tensors, so that shapes shrink and the function stays."""
