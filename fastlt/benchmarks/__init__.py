"""One module a benchmark; fastlt/commands/benchmark.py names them."""
