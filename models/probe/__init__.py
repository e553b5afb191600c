"""A task that says something about the harness and nothing about learning: for tests, chaos and benchmarks."""
