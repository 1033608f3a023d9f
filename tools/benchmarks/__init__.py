"""One module a benchmark; tools/benchmark.py names them."""
