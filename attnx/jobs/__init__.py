"""The batch job: many images in, shards of maps out."""
