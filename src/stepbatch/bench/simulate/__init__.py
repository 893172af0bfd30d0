"""``stepbatch bench simulate``: the engine's own scheduler against a predicted clock."""
