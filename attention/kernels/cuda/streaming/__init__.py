"""A step of a stream on CUDA: the new key and value are written into their slots, which are read as they lie."""
