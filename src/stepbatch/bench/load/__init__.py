"""The load client: what a server is sent, what it answers, and how the client itself does."""
