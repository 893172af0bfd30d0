"""``stepbatch profile``: what a model's work costs on this machine, and how far batching pays."""
