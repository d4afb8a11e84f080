"""The command line: one module a command; options that commands share are in `options` and `job_options`."""
