"""``stepbatch bench sweep``: one load after another, to see where a server tips over."""
