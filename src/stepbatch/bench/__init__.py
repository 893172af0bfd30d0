"""``stepbatch bench``: how a server does under load, and the engine without one.

The client imports no torch. It drives any server with OpenAI's image or video API.
"""
