"""Engines: they distribute the shards of a job to this process, a process per device, or actors of a Ray cluster.

All of them only call `Worker.run_shard`, so the files are the same for every engine.
"""
