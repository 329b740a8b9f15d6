"""`practical`: attention within a memory budget, as a whole, in slices or in blocks."""
