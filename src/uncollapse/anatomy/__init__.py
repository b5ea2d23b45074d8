"""Trace one forward pass, read blocks and parts out of the graph, prove them on the live model, and stand at an operation of it.

Each of `torch_calls`, `tracing`, `interception`, `vocabulary`, `reading` and `proof` uses only the ones before it. No module is
known by its name.
"""
