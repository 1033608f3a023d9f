"""The paper's result tables: the runs that their rows take, and our numbers beside the published ones."""
