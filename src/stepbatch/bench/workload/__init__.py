"""What is sent, and when: datasets, profiles, traces, arrivals, goals."""
