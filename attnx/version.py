"""The version of the package."""

VERSION = "0.2.0"

MAPS_VERSION = "0.1.0"
"""The last version that changed a bit of a job's maps. Jobs of versions since then can be continued."""
