"""Who makes which shard of a job: this process, one a device, ranks that share it, or the actors of a Ray cluster.

All of them call `Worker.run_shard` and nothing else, so the files are the same whoever made them.
"""
