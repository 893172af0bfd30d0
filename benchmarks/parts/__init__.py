"""What ``batching.py`` measures, a subject a file."""
