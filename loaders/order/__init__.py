"""Which image comes when: long-tailed subsampling, sampling, and plans of epochs."""
