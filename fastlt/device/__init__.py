"""What depends on the machine: compilation, processes, memory."""
