"""The attention op: attention whose weights are also reduced over the heads to a map.

`functional` is the public API, `operators` registers it with torch, `backends` are the implementations.
"""
