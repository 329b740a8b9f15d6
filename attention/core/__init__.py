"""The shared vocabulary of the engine: workloads, plans, routes, events, results, statistics, errors. No MLX."""
