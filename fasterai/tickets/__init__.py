"""Which weights of a network are kept, as values: masks and lottery tickets."""
