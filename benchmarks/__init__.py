"""The kernels measured against their peers; run from a checkout, not installed."""
